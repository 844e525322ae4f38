"""The peer as its users run it: transformers' Trainer, and TRL's, an optimizer step a turn."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from padded import BATCH, DEVICE
from transformers import Trainer, TrainerCallback


def arguments(folder: Path, steps: int, micro_batches: int, batch: int = BATCH) -> dict:
    """Those of any Trainer: float32 on a CPU, bfloat16 on a GPU, AdamW at a constant rate; nothing is clipped, saved or
    tracked."""
    from training import BETAS, DECAY, EPSILON, RATE

    return {
        "output_dir": str(folder / "trainer"), "use_cpu": DEVICE.type == "cpu", "bf16": DEVICE.type == "cuda",
        "max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": micro_batches,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant", "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": EPSILON,
        "weight_decay": DECAY, "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


class _Turns(TrainerCallback):
    """Holds the trainer's thread after each step; what is logged of the step is handed over."""

    def __init__(self):
        self.go, self.done = threading.Semaphore(0), queue.Queue()

    def on_train_begin(self, args, state, control, **kwargs):
        self.go.acquire()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # not at the end
            self.done.put({"loss": logs["loss"]})
            self.go.acquire()


def by_turns(make: type[Trainer], count: Callable[[dict], dict[str, float]], **given) -> Callable[[], dict]:
    """A turn is one optimizer step of `make(**given)`, its data included. `count` says of a micro-batch what is in it;
    its numbers are added up over the step."""
    found: dict[str, float] = {}

    class Counting(make):
        def training_step(self, model, inputs, num_items_in_batch=None):
            for name, number in count(inputs).items():
                found[name] = found.get(name, 0) + number
            return super().training_step(model, inputs, num_items_in_batch)

    turns = _Turns()
    trainer = Counting(**given, callbacks=[turns])

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:  # the thread that waits raises it
            turns.done.put(error)

    threading.Thread(target=train, daemon=True).start()

    def turn() -> dict:
        found.clear()
        turns.go.release()
        said = turns.done.get()
        if isinstance(said, BaseException):
            raise said
        return said | found

    return turn


def peer_turns(folder: Path, batch: int) -> Callable[[], dict]:
    """The reward model of start/ on the examples of steps.jsonl, `batch` at once, grouped by length (within
    50 batches), and gradients added up over about as many examples as a step of ours has."""
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorWithPadding, LlamaForSequenceClassification, TrainingArguments

    steps = [json.loads(line) for line in (folder / "steps.jsonl").open()]
    rows = [{"input_ids": e["tokens"], "labels": list(map(float, e["ratings"]))} for step in steps for e in step]
    micro_batches = max(1, round(len(rows) / len(steps) / batch))
    shared = arguments(folder, len(steps), micro_batches, batch)

    def count(inputs: dict) -> dict[str, float]:
        mask = inputs["attention_mask"]
        return {"examples": len(mask), "unshared_tokens": int(mask.sum()), "computed_tokens": mask.numel()}

    class Mean(Trainer):
        def __init__(self, **given):
            super().__init__(**given)
            # The classifier takes the count of the whole step and does not divide by it, so the Trainer would add the
            # micro-batches' means up (transformers 5.24).
            self.model_accepts_loss_kwargs = False

    return by_turns(
        Mean,
        count,
        model=LlamaForSequenceClassification.from_pretrained(folder / "start", dtype=torch.float32),
        args=TrainingArguments(train_sampling_strategy="group_by_length", **shared),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(folder / "start", pad_token_id=0)),
    )
