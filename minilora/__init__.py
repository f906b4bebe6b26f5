"""QLoRA for Qwen2.5, written by hand in PyTorch. This page is the map: read the modules in this order.

    errors      the one exception that a user's mistake raises
    console     what a program says while it works: lines, warnings, progress; --quiet
    script      how a script begins and ends: arguments, messages, exit status, signals
    files       single files that stay when they are written; locks
    manifest    folders that are there as a whole or not at all, verified by SHA-256
    yamlfile    YAML, read strictly
    fields      a value from a file -> the type and range of the field that takes it
    config      YAML and section.key=value -> a frozen Config, all problems in one error
    prompt      text -> token ids in ChatML; the only place where a token becomes supervised
    rows        data files -> rows
    data        rows -> clean, deduplicated, leak-free splits; the order of an epoch
    batch       examples -> one packed, padding-free micro-batch with a shared prefix
    ops         RMSNorm, rotary embedding, SwiGLU, attention, each with its gradient derived by hand
    bnb         bitsandbytes, imported on first use
    nf4         4-bit NormalFloat: quantise, dequantise, the linear layer over it
    lora        the LoRA linear layer, its gradient derived; where it is attached
    recompute   gradient checkpointing: a layer that runs again in backward
    model       Qwen2.5 in plain PyTorch; here stands the legend of sizes (T, C, H, K, D, F, V, R, P, S)
    tensorfile  safetensors files, one tensor at a time
    quantized   checkpoints that are in 4 bits already, as transformers reads and writes them
    load        config.json and safetensors -> the model, tensor by tensor, quantised on arrival
    adapter     adapter files as peft reads and writes them
    loss        summed negative log-likelihood of the supervised rows, and their count
    optim       AdamW; the learning rate as a function of the step
    step        one optimizer step: micro-batches -> loss -> gradient -> clip -> update
    checkpoint  everything that a run needs to go on, verified before it is trusted
    cache       4-bit copies of base models on disk, checked by hash
    metrics     accuracy, precision, recall, F1, their intervals and tests, from scratch
    evaluate    model + examples -> label probabilities and loss
    runlog      metrics.jsonl, progress bar, plot
    memory      bytes predicted and bytes measured
    download    a name on the hub -> the folder of its snapshot, continued after a break, hashed
    hub         the name of a model or a data set -> a local folder
    build       what a configuration names, as objects
    plan        what --dry-run prints
    modelcard   the README of an adapter
    origin      what a run was made from, and whether that is the same now
    trained     a trained adapter's folder -> its configuration, base model, prompt and model
    run         the objects of a run and its state: opened, resumed or refused
    final       how a run ends: scored, its adapter written and read back
    train       fit(): the only loop

A module imports only modules above it (tests/test_structure.py). Start with `train.fit` if you want to see the
whole first, with `prompt` if you want to follow one record.
"""

__version__ = "0.1.0"
