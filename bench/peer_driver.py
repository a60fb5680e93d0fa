"""TRL's DistillationTrainer on the work of bench.end_to_end, through its public API. Runs in an environment of its own.

    python -P peer_driver.py STUDENT TEACHER PROMPTS NEW_TOKENS BATCH LR

For every line N on its standard input it trains N steps and prints one JSON line, {"steps": [[seconds, tokens], …]};
between them it waits, so that whoever asks can measure in turns. It ends with its input. Imports nothing of potstill.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

FOREVER = 1_000_000  # steps; the input's end comes first


def main() -> None:
    student, teacher, prompts, new_tokens, batch, lr = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as scratch:
        trainer = made(Path(scratch), student, teacher, Path(prompts), int(new_tokens), int(batch), float(lr))
        trainer.add_callback(turns(sys.stdin, answers))
        trainer.train()


def made(scratch: Path, student: str, teacher: str, prompts: Path, new_tokens: int, batch: int, lr: float) -> Any:
    """The trainer with the same settings as ours, and no work that ours does not do."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    config = DistillationConfig(
        output_dir=str(scratch),
        max_steps=FOREVER,
        per_device_train_batch_size=batch,
        max_completion_length=new_tokens,
        learning_rate=lr,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        beta=1.0,  # reverse KL
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    models = {name: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (student, teacher)}
    return DistillationTrainer(
        model=models[student],
        teacher_model=models[teacher],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(student),
    )


def turns(questions: TextIO, answers: TextIO) -> Any:
    """A callback that trains as many steps as it is asked for, and times them."""
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class Turns(TrainerCallback):  # type: ignore[misc]
        wanted = 0
        steps: list[list[float]] = []  # noqa: RUF012
        last = 0.0
        lengths: list[float] = []  # noqa: RUF012

        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
        ) -> None:
            self._next(control)

        def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
            """After each step, whose work is then done."""
            logs = others["logs"]
            if "completions/mean_length" not in logs:
                return
            now = time.perf_counter()
            tokens = logs["completions/mean_length"] * args.per_device_train_batch_size
            self.steps.append([now - self.last, tokens])
            self.last = now
            if len(self.steps) == self.wanted:
                print(json.dumps({"steps": self.steps}), file=answers, flush=True)
                self.steps = []
                self._next(control)

        def _next(self, control: TrainerControl) -> None:
            line = questions.readline()
            self.wanted = int(line or 0)
            control.should_training_stop = not line
            self.last = time.perf_counter()

    return Turns()


if __name__ == "__main__":
    main()
