"""The example of cleaning drops copies, near copies and evaluation texts, and nothing else."""

import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "clean_corpus.py"
EVALUATION = "A quick brown fox jumps over the lazy dog while seven wizards brew a potion in the tower at night."


def test_copies_and_evaluation_texts_go_and_all_else_stays(tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(errors="replace")[:6000] for path in sorted(library.glob("*.py"))[:40]]
    texts = [text for text in texts if len(text) > 3000]
    copy, near, quoting = texts[0], texts[3].replace("the", "thee", 1), f"{texts[10][:2000]} {EVALUATION.lower()} more"
    documents = [*texts, copy, near, quoting]
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number::3]]
        (tmp_path / "corpus" / f"{number}.jsonl").write_text("".join(lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": EVALUATION}) + "\n")
    paths = ["--input", tmp_path / "corpus", "--evaluation", tmp_path / "test.jsonl", "--output", tmp_path / "cleaned"]

    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, paths)], capture_output=True, text=True, check=True)

    kept = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "cleaned").glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert len(kept) == len(texts)
    # of two copies either may stay
    assert {texts[3] if text == near else text for text in kept} == set(texts)
    expected = f"read: {len(documents)}, near duplicates: 2, evaluation texts: 1, kept: {len(texts)}"
    assert done.stdout.splitlines()[-1] == expected
