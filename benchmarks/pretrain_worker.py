"""A worker that runs eight optimizer steps of pretraining at a time: a plain loop, or the pretrain stage's trainer."""

import argparse
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peers import peak_mib, work_on_request
from ppo_worker import SHAPES, Turns
from transformers import GPT2Config, GPT2LMHeadModel

STEPS, BLOCK = 8, 256
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(shape: str) -> Any:
    """Return a GPT-2 with random weights and without dropout."""
    width, layers, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=BLOCK, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
            attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def blocks_of(shape: str, count: int) -> torch.Tensor:
    """Return random token ids, (count, BLOCK)."""
    return torch.randint(0, SHAPES[shape][3], (count, BLOCK), generator=torch.Generator().manual_seed(0))


def plain(options: Any) -> None:
    """Train with a loop as written by hand: float32, AdamW, gradient clipping, a schedule."""
    model, blocks = model_of(options.shape).train(), blocks_of(options.shape, 64 * options.batch).to(DEVICE)
    imports_mib, started = peak_mib(), 0.0
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def begin() -> None:
        nonlocal started
        started = time.perf_counter()

    report, step = work_on_request(begin), 0
    while True:
        for _ in range(STEPS):
            rows = torch.arange(step * options.batch, (step + 1) * options.batch, device=DEVICE) % len(blocks)
            loss = model(input_ids=blocks[rows], labels=blocks[rows]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
        last_loss = float(loss)  # also waits for a GPU to finish
        seconds = time.perf_counter() - started
        report({"seconds": seconds, "above_imports": peak_mib() - imports_mib, "loss": last_loss})


def ours(options: Any, folder: str) -> None:
    """Train with the trainer of the pretrain stage, on blocks that are already packed."""
    from rlhf_recipes import PretrainConfig
    from rlhf_recipes.system import choose_precision, configure_cpu_runtime_
    from rlhf_recipes.training import PretrainTrainer, collate_blocks

    precision = {} if options.defaults else {"bf16": False}
    args = PretrainConfig(
        output_dir=folder, per_device_train_batch_size=options.batch, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=100_000, max_steps=100_000, lr_scheduler_type="constant", **precision,
    )  # fmt: skip
    args = choose_precision(args, SHAPES[options.shape][0])
    configure_cpu_runtime_(args, SHAPES[options.shape][0])
    torch.set_num_threads(1)
    rows = Dataset.from_dict({"input_ids": blocks_of(options.shape, 64 * options.batch).numpy()})
    PretrainTrainer(
        model=model_of(options.shape),
        args=args,
        train_dataset=rows,
        data_collator=collate_blocks,
        callbacks=[Turns(STEPS, args.device)],
    ).train()


def main() -> None:
    """Run steps on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["plain", "ours"])
    parser.add_argument("--shape", default="14M", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=8, help="blocks per step")
    parser.add_argument("--defaults", action="store_true", help="bfloat16 if it is faster on this hardware")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        plain(options) if options.side == "plain" else ours(options, folder)


if __name__ == "__main__":
    main()
