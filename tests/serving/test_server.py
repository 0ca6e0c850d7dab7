"""`vllm serve` on an export: the plugin is found by its entry point, and the API answers what transformers does."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engine import ARCHITECTURES, NEW_TOKENS, POLICIES, PROMPTS, transformers_answers, write_export

START_SECONDS = 240


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer whose text shows the ids: "t5 t17"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    architecture = ARCHITECTURES["gelu moa"]
    folder = write_export(tmp_path_factory.mktemp("export"), architecture, POLICIES["threshold"])
    words = {f"t{index}": index for index in range(architecture.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(export),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--served-model-name", "dsmoe"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-5000:]}")


def ask(url: str, **values: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(values).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_completions_are_the_greedy_tokens_of_transformers(export: Path, address: str) -> None:
    prompts = [" ".join(f"t{token}" for token in prompt) for prompt in PROMPTS]

    answer = ask(
        f"{address}/completions",
        model="dsmoe",
        prompt=prompts,
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        skip_special_tokens=False,
    )

    texts = [choice["text"].split() for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    assert texts == [[f"t{token}" for token in each.tokens] for each in transformers_answers(export)]


@pytest.mark.parametrize("prompt", ["", " ".join(["t1"] * 200)])
def test_a_prompt_that_cannot_be_answered_is_refused(address: str, prompt: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        ask(f"{address}/completions", model="dsmoe", prompt=prompt, max_tokens=1)

    assert refusal.value.code == 400
