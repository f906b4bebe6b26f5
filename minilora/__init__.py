"""QLoRA for Qwen2.5, written by hand in PyTorch. This page is the map: read the modules in this order.

  The ground: programs, files, configuration
    errors         the one exception that a user's mistake raises
    console        what a program says while it works: lines, warnings, progress; --quiet
    script         how a script begins and ends: arguments, messages, exit status, signals
    files          single files that stay when they are written; locks
    manifest       folders that are there as a whole or not at all, verified by SHA-256
    yamlfile       YAML, read strictly
    fields         a value from a file -> the type and range of the field that takes it
    config         YAML and section.key=value -> a frozen Config, all problems in one error

  A record on its way to the model
    prompt         text -> token ids in ChatML; the only place where a token becomes supervised
    lines          files and pipes -> lines of text, one at a time
    rows           data files -> rows
    data           rows -> clean, deduplicated, leak-free splits; the order of an epoch
    batch          examples -> one packed, padding-free micro-batch with a shared prefix

  The model, its 4-bit weights, its adapter
    ops            RMSNorm, rotary embedding, SwiGLU, attention, each with its gradient derived by hand
    bnb            bitsandbytes, imported on first use
    nf4            4-bit NormalFloat: quantise, dequantise, the linear layer over it
    gemv           products of a few rows straight from 4 bits, for generating
    targets        which linear layers get an adapter, and of which rank
    dropout        dropout masks that need no state
    dora           DoRA's lengths, their gradient derived
    lora           the LoRA linear layer, its gradient derived
    attach         adapters on a model: attached, listed, switched, scaled, merged for the time being
    recompute      gradient checkpointing: a layer that runs again in backward
    keyvalues      keys and values of rows that were run, for the rows behind them
    model          Qwen2.5 in plain PyTorch; here stands the legend of sizes (T, C, H, K, D, F, V, R, P, S)

  Their files
    sizes          the sizes of Qwen2.5 by name, without their files
    tensorfile     safetensors files, one tensor at a time
    quantized      checkpoints that are in 4 bits already, as transformers reads and writes them
    load           config.json and safetensors -> the model, tensor by tensor, quantised on arrival
    initial        first values of an adapter that depend on the weights: PiSSA, LoftQ
    adapterconfig  what an adapter is, as peft writes it down
    adapter        adapter files as peft reads and writes them
    merge          an adapter and its base -> one dense checkpoint
    ggufile        a dense checkpoint -> a GGUF file for llama.cpp

  Training
    loss           summed negative log-likelihood of the supervised rows, and their count
    optim          AdamW; the learning rate as a function of the step
    distributed    several processes that train one adapter: what each does alone, and where they meet
    step           one optimizer step: micro-batches -> loss -> gradient -> clip -> update
    checkpoint     everything that a run needs to go on, verified before it is trusted
    cache          4-bit copies of base models on disk, checked by hash

  Scores and answers
    metrics        accuracy, precision, recall, F1, their intervals and tests, from scratch
    evaluate       model + examples -> label probabilities and loss
    generate       model + ids -> the ids that go on, one after another, with a key/value cache
    drift          how far two models' probabilities are apart

  What is shown
    trackers       TensorBoard and Weights & Biases
    runlog         metrics.jsonl, progress bar
    markup         HTML in which text stays text
    plots          loss.png, and the pictures of a page
    answers        confusion matrix, calibration and worst mistakes, as parts of a page
    report         report.html: one page on a run or an evaluation
    memory         bytes predicted and bytes measured

  What is done with a trained model
    predict        reviews without a label, as many as come -> labels, in their order
    chat           turns of a conversation -> an answer's text, piece by piece

  From names to objects
    download       a name on the hub -> the folder of its snapshot, continued after a break, hashed
    hub            the name of a model or a data set -> a local folder
    build          what a configuration names, as objects
    plan           what a configuration takes: its largest micro-batch, its ledger, what --dry-run prints
    budget         what fits a budget of memory, and what would help
    modelcard      the README of an adapter
    origin         what a run was made from, and whether that is the same now
    trained        a trained adapter's folder -> its configuration, base model, prompt and model

  The run
    run            the objects of a run and its state: opened, resumed or refused
    final          how a run ends: scored, its adapter written and read back
    train          fit(): the only loop

A module imports only modules above it (tests/test_structure.py). Start with `train.fit` if you want to see the
whole first, with `prompt` if you want to follow one record.
"""

__version__ = "0.1.0"
