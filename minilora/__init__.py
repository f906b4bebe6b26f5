"""QLoRA for Qwen2.5, written by hand in PyTorch. One record goes down the page once:

    config -> prompt -> data -> batch -> model -> loss -> step -> checkpoint -> metrics

A folder imports only what stands above it here; tests/test_structure.py holds that.

    errors        the one exception that a user's mistake raises
    system        console, arguments and exit status, signals, files, checksums, strict YAML, ranks, bitsandbytes
    config        YAML and section.key=value -> one frozen Config, all problems in one error
    qlora         the hour: QLoRA itself, from text to an optimizer step
    data          files -> fields -> records -> clean, deduplicated splits -> examples; names on the hub -> folders
    weights       safetensors, config.json, the loader, 4-bit checkpoints, GGUF
    adapters      LoRA on a model: attached, initialized, its optimizers, saved as peft does, merged
    evaluation    metrics, scoring, calibration, thresholds, comparison of runs, prediction
    generation    decoding with a KV cache, GEMV on 4-bit weights, chat, Modelfiles
    build         what a configuration names, as objects
    planning      memory: the estimate, the plan, what fits a budget
    reports       report.html, sweep.html, plots, model card
    runs          the training loop, a run's state from the first step to the final adapter, sweeps of runs

Reading order of qlora/, an hour:

    prompt          text -> token ids in ChatML; the only place where a token becomes supervised
    batch           examples -> one packed, padding-free micro-batch with a shared prefix
    nf4             4-bit NormalFloat: quantise, dequantise, the linear layer over it
    lora            the LoRA linear layer: five lines of autograd, then the same with its gradient derived
    ops             RMSNorm, rotary embedding, SwiGLU: each a reference, then its derived backward pass
    attention       the same for attention within packed segments; PyTorch's fused kernel for long ones
    model           Qwen2.5 in plain PyTorch; the legend of sizes (T, C, H, K, D, F, V, R, P, S)
    loss            hidden states at the supervised positions -> summed negative log-likelihood
    optim           AdamW; the learning rate as a function of the step
    step            one optimizer step: micro-batches -> loss -> gradient -> clip -> update

Beside them: flash (attention's one call on a GPU), dora, kv_cache, checkpointing.

Order of data/, from a file to what a step takes:

    lines, delimited, json_stream    bytes -> lines, rows of CSV and TSV, JSON objects
    readers                          a file of any kind -> a record's fields by column
    conversations, labels, records   fields -> a conversation's turns, or a text with its label
    clean, spill, prepare            records -> splits; texts wait on the disk, hashes are compared
    encode, token_store, examples    records -> token ids in flat arrays beside the data, made once
    sampler                          the order of an epoch; an optimizer step's micro-batches

Start with `runs/train.py` to see the whole first, with `qlora/lora.py` to see what QLoRA is.
"""

__version__ = "0.1.0"
