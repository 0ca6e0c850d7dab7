"""The whole main job, small: corpus -> tokenizer -> datasets -> training -> export -> generation.

    make quickstart        (or: .venv/bin/python launchers/quickstart.py)

Everything is real and comes from this machine: text and code that every Python installation has, two processes, the
code that runs on clusters. Each step is one command that is printed as it runs; all it makes lies in quickstart_run/.
A second call goes on from what is there; remove the folder to start over.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("quickstart_run")
PROMPT = "def __init__(self, "
POLICIES = ("dense", "topk", "threshold")


def main() -> None:
    os.chdir(ROOT)  # the recipe's paths are relative to it
    started = time.perf_counter()
    make_data()
    train()
    export = RUN / "export"
    call("checkpoints_tools/export_hf.py", "--checkpoint", RUN / "run", "--output", export, "--overwrite")
    speeds = generate(export)
    print_summary(speeds, time.perf_counter() - started)


def make_data() -> None:
    """Collect the corpus, train the tokenizer on it, and make a dataset of each part."""
    corpus, tokenizer = RUN / "corpus", RUN / "tokenizer.model"
    call("data_tools/collect_local_corpus.py", "--output", corpus)
    if not tokenizer.is_file():
        training_text = [corpus / kind / "train.jsonl.zst" for kind in ("text", "code")]
        output = tokenizer.with_suffix("")
        call("data_tools/train_tokenizer.py", "--input", *training_text, "--output", output, "--vocab-size", 4096)
    for kind in ("text", "code"):
        for split, ending in (("train", ""), ("validation", "_validation")):
            source, prefix = corpus / kind / f"{split}.jsonl.zst", RUN / "data" / f"{kind}{ending}"
            arguments = ["--input", source, "--output-prefix", prefix, "--tokenizer", tokenizer, "--workers", 2]
            call("data_tools/preprocess.py", *arguments)


def train() -> None:
    """Two data-parallel processes, as a cluster would run them."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    call(*torchrun, "-m", "dsmoe_megatron", "pretrain", "--config", "launchers/recipes/quickstart.yaml")


def generate(export: Path) -> list[dict[str, Any]]:
    """Generate in a fresh process, which knows nothing of this package but what lies in the export."""
    sampling = ["--max-new-tokens", 48, "--temperature", 0.7]
    arguments = ["--model", export, "--prompt", PROMPT, "--policies", *POLICIES, *sampling, "--json"]
    lines = call("checkpoints_tools/generate.py", *arguments, capture=True).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    for result in results:
        print(f"[{result['policy']}] {result['text']!r}")
    return results


def call(*arguments: object, capture: bool = False) -> str:
    """Run one step with this Python; a failing one ends the quickstart with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    output = subprocess.PIPE if capture else None
    step = subprocess.run([sys.executable, *words], env=environment, stdout=output, text=True, check=False)
    if step.returncode != 0:
        print(f"quickstart: error: this step failed with exit code {step.returncode}", file=sys.stderr)
        sys.exit(step.returncode)
    return step.stdout or ""


def print_summary(speeds: list[dict[str, Any]], seconds: float) -> None:
    """The few figures that tell whether it worked, and where everything lies."""
    step = (RUN / "run" / "latest").read_text(encoding="utf-8").strip()
    progress = json.loads((RUN / "run" / "checkpoints" / step / "progress.json").read_text(encoding="utf-8"))
    first, last, validation = progress["first"], progress["last"], progress["last_validation"]
    rows = [
        ("training loss", f"{first['lm_loss']:.3f} at step {first['step']} -> {last['lm_loss']:.3f} at {last['step']}"),
        ("training speed", f"{last['tokens_per_s']:,.0f} tokens/s on 2 processes"),
        ("validation loss, dense", f"{validation['validation_loss']:.3f}"),
    ]
    for name, figures in validation["policies"].items():
        text = f"perplexity {figures['perplexity']:8.2f}   active parameters {figures['active_share']:4.0%}"
        rows.append((f"policy {name}", text))
    for speed in speeds:
        text = f"prefill {speed['prefill_tokens_per_s']:,.0f}, decode {speed['decode_tokens_per_s']:,.0f} tokens/s"
        rows.append((f"export, {speed['policy']}", text))
    run = RUN / "run"
    rows += [
        ("run", f"{run} (metrics.jsonl, expert_use.jsonl; tensorboard --logdir {run})"),
        ("Hugging Face model", str(RUN / "export")),
        ("time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows))


if __name__ == "__main__":
    main()
