"""One training system in a process of its own: `python benchmarks/contestants.py NAME WORKLOAD_JSON`.

The last line that it prints is JSON: seconds, tokens and loss of each step, and the peaks of memory while loading and
while training. `compare_peft.py` starts these processes and reads them; a contestant can be run by hand as well.

Equal for all: checkpoint, ids, batches, initial adapter (r on all seven projections, alpha 2 r, dropout 0), AdamW at
the same rate, gradients clipped to 1, bfloat16, NF4 with double quantisation unless the name says otherwise.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meter import Meter
from workload import Workload, pad, record

from minilora.errors import UserError
from minilora.system.cli import run_script
from minilora.system.process import tuned_process

# Small, so that rounding stays rounding: AdamW's first steps move every entry of B by the whole rate in the direction
# of its gradient's sign, and at 2e-4 two bfloat16 runs of equal systems part after three steps. It costs no time.
LEARNING_RATE = 1e-6
MAX_GRAD_NORM = 1.0


@tuned_process()
def run_minilora(
    work: Workload,
    meter: Meter,
    sort: bool = False,
    quantization: str = "nf4",
    share_prefix: bool = True,
    gradient_checkpointing: bool = False,
    cache_dequantized: bool = False,
    max_rows: int | None = None,
) -> None:
    """minilora's own step, as `train.fit` calls it."""
    from minilora.adapters.attach import parameter_groups
    from minilora.adapters.optimizers import build_optimizer
    from minilora.adapters.peft_files import load_adapter
    from minilora.data.sampler import split_into_micro_batches
    from minilora.qlora.batch import pack
    from minilora.qlora.lora import DropoutSeed
    from minilora.qlora.nf4 import Linear4bit
    from minilora.qlora.step import StepSettings, TrainState, train_step
    from minilora.weights.load import load_model

    model = load_model(Path(work.model), work.dtype, quantization, device=work.device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.cache_dequantized = cache_dequantized
    load_adapter(model, Path(work.adapter))
    model.train()
    model.model.gradient_checkpointing = gradient_checkpointing
    optimizer = build_optimizer(parameter_groups(model))
    meter.loaded()
    for number, examples in enumerate(work.batches(sort), start=1):
        real = sum(len(example.input_ids) for example in examples)
        with meter.step(real, 0) as row:
            parts = split_into_micro_batches(examples, len(examples), max_rows)
            batches = [pack(part, share_prefix).to(torch.device(work.device)) for part in parts]
            row["computed_tokens"] = sum(len(batch.input_ids) for batch in batches)
            row["loss"] = train_step(
                TrainState(model, optimizer, DropoutSeed()), batches, StepSettings(number, LEARNING_RATE, MAX_GRAD_NORM)
            ).loss


def load_base(work: Workload, quantization: str) -> Any:
    """transformers' model, in NF4 with double quantisation or dense."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=work.dtype,
    )
    arguments = {} if quantization == "none" else {"quantization_config": quantized}
    return transformers.AutoModelForCausalLM.from_pretrained(
        work.model, dtype=work.dtype, device_map=work.device, **arguments
    )


def load_peft(work: Workload, quantization: str, prepare: bool, gradient_checkpointing: bool) -> Any:
    """peft's model over transformers', as peft's guide to quantisation sets it up (`prepare`), or left as loaded."""
    import peft

    model = load_base(work, quantization)
    model.config.use_cache = False
    how = {"use_reentrant": False}
    if prepare:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing, how)
    elif gradient_checkpointing:
        model.gradient_checkpointing_enable(how)
        model.enable_input_require_grads()
    return peft.PeftModel.from_pretrained(model, work.adapter, is_trainable=True).train()


def run_peft_loop(
    work: Workload,
    meter: Meter,
    sort: bool,
    gradient_checkpointing: bool,
    prepare: bool = True,
    quantization: str = "nf4",
) -> None:
    """A training loop by hand around peft."""
    model = load_peft(work, quantization, prepare, gradient_checkpointing)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    meter.loaded()
    for examples in work.batches(sort):
        real = sum(len(example.input_ids) for example in examples)
        computed = len(examples) * max(len(example.input_ids) for example in examples)
        with meter.step(real, computed) as row:
            loss = model(**pad(examples, work.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row["loss"] = loss.item()


def run_trainer(work: Workload, meter: Meter, gradient_checkpointing: bool) -> None:
    """transformers.Trainer over the sorted order (see `workload.py`), one batch a step."""
    import transformers

    model = load_peft(work, "nf4", True, gradient_checkpointing)
    batches = work.batches(sort=True)
    arguments = transformers.TrainingArguments(**_trainer_arguments(work, gradient_checkpointing))
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[record(example) for batch in batches for example in batch],
        data_collator=lambda records: _collate(records, work.device),
        callbacks=[_step_timer(meter, batches)],
    )
    meter.loaded()
    trainer.train()
    _take_losses(meter, trainer.state.log_history)


def run_sft_trainer(work: Workload, meter: Meter, gradient_checkpointing: bool) -> None:
    """trl's SFTTrainer over the sorted order; its loss skips unsupervised positions in chunks."""
    import datasets
    import peft
    import transformers
    import trl

    datasets.disable_progress_bars()
    base = load_base(work, "nf4")
    model = peft.PeftModel.from_pretrained(base, work.adapter, is_trainable=True)
    batches = work.batches(sort=True)
    arguments = trl.SFTConfig(
        loss_type="chunked_nll",
        dataset_kwargs={"skip_prepare_dataset": True},
        **_trainer_arguments(work, gradient_checkpointing),
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([record(example) for batch in batches for example in batch]),
        data_collator=lambda records: _collate(records, work.device),
        processing_class=transformers.AutoTokenizer.from_pretrained(work.model),
        callbacks=[_step_timer(meter, batches)],
    )
    meter.loaded()
    trainer.train()
    _take_losses(meter, trainer.state.log_history)


def _trainer_arguments(work: Workload, gradient_checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": str(Path(work.adapter) / "trainer"),
        "per_device_train_batch_size": work.batch_size,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch",
        "bf16": True,
        "use_cpu": work.device == "cpu",
        "gradient_checkpointing": gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


def _collate(records: list[dict[str, list[int]]], device: str) -> dict[str, torch.Tensor]:
    from minilora.qlora.prompt import Example

    examples = [Example(row["input_ids"], [label >= 0 for label in row["labels"]]) for row in records]
    return pad(examples, device)


def _step_timer(meter: Meter, batches: list[list[Any]]) -> Any:
    """A callback that opens and closes the meter's step around each step of a Trainer."""
    import transformers

    class StepTimer(transformers.TrainerCallback):
        def on_step_begin(self, arguments: Any, state: Any, control: Any, **ignored: Any) -> None:
            examples = batches[state.global_step]
            real = sum(len(example.input_ids) for example in examples)
            self.open = meter.step(real, len(examples) * max(len(example.input_ids) for example in examples))
            self.open.__enter__()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **ignored: Any) -> None:
            self.open.__exit__(None, None, None)

    return StepTimer()


def _take_losses(meter: Meter, history: list[dict[str, float]]) -> None:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    for row, loss in zip(meter.results["steps"], losses, strict=True):
        row["loss"] = loss


def variant(run: Callable[..., None], **options: Any) -> Callable[[Workload, Meter], None]:
    """`run` with its options fixed."""
    return lambda work, meter: run(work, meter, **options)


# Name in tables -> how it is run. `sort=True` takes the batches longest first.
CONTESTANTS: dict[str, Callable[[Workload, Meter], None]] = {
    "minilora": variant(run_minilora),
    "minilora, length-sorted": variant(run_minilora, sort=True),
    "minilora, 320 tokens at a time": variant(run_minilora, max_rows=320),
    "minilora, checkpointing": variant(run_minilora, gradient_checkpointing=True),
    "minilora, prefix not shared": variant(run_minilora, share_prefix=False),
    "minilora, dense weights kept": variant(run_minilora, cache_dequantized=True),
    "minilora, length-sorted, LoRA without 4 bits": variant(run_minilora, sort=True, quantization="none"),
    "peft loop, padded, checkpointing": variant(run_peft_loop, sort=False, gradient_checkpointing=True),
    "peft loop, padded": variant(run_peft_loop, sort=False, gradient_checkpointing=False),
    "peft loop, length-sorted, checkpointing": variant(run_peft_loop, sort=True, gradient_checkpointing=True),
    "peft loop, length-sorted": variant(run_peft_loop, sort=True, gradient_checkpointing=False),
    "peft loop, length-sorted, no upcasts": variant(
        run_peft_loop, sort=True, gradient_checkpointing=False, prepare=False
    ),
    "peft loop, length-sorted, LoRA without 4 bits": variant(
        run_peft_loop, sort=True, gradient_checkpointing=False, prepare=False, quantization="none"
    ),
    "Trainer, length-sorted, checkpointing": variant(run_trainer, gradient_checkpointing=True),
    "Trainer, length-sorted": variant(run_trainer, gradient_checkpointing=False),
    "SFTTrainer, length-sorted, checkpointing": variant(run_sft_trainer, gradient_checkpointing=True),
    "SFTTrainer, length-sorted": variant(run_sft_trainer, gradient_checkpointing=False),
}


def main() -> None:
    """Runs the contestant that the command line names."""
    if len(sys.argv) != 3 or sys.argv[1] not in CONTESTANTS:
        raise UserError(f"usage: contestants.py NAME WORKLOAD_JSON; NAME is one of {', '.join(CONTESTANTS)}")
    work = Workload.from_json(sys.argv[2])
    meter = Meter(work.device)
    started = time.perf_counter()
    CONTESTANTS[sys.argv[1]](work, meter)
    meter.finish()
    print(json.dumps({**meter.results, "name": sys.argv[1], "process_s": time.perf_counter() - started}))


if __name__ == "__main__":
    run_script(main)
