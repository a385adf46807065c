"""Hugging Face's Trainer with 2:4 sparse feed-forward layers: model.compile, and a callback of a few lines.

python examples/with_hf_trainer.py --out runs/hf [--resume]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sparse24
from _tiny import CONTEXT, VOCABULARY, Bytes, parse, recipe


class Sparse24Callback(TrainerCallback):
    """Adds the session's metrics to the log, and its state to every checkpoint and to a resumed run."""

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        numbers = sparse24.session(model).metrics(per_layer=False)
        metrics = {f"sparse24/{key}": value for key, value in numbers.items()}
        state.log_history[-1].update(metrics)
        logs.update(metrics)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        torch.save(sparse24.session(model).state_dict(), self._file(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:  # resumed: model and optimizer are loaded by now
            sparse24.session(model).load_state_dict(torch.load(self._file(args, state), weights_only=True))

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "sparse24.pt"


class Texts(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.data = Bytes()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.data[i], "labels": self.data[i]}


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, and returns the mean loss of the last logged steps."""
    args = parse(__doc__, argv)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **sizes))
    model.compile(backend="sparse24", options=recipe(args))
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        save_steps=args.save_every,
        logging_steps=args.save_every,
        per_device_train_batch_size=args.batch,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=[Sparse24Callback()])
    trainer.train(resume_from_checkpoint=args.resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
