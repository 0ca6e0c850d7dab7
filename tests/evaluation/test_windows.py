"""Windows: every token is predicted once, with the context that the stride promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_megatron.evaluation.loading import load_model
from dsmoe_megatron.evaluation.perplexity import sweep
from dsmoe_megatron.evaluation.windows import Stream, WindowOptions, make_batches, open_streams, windows_of
from dsmoe_megatron.inference.policy import ExpertPolicy
from tests.evaluation.conftest import END_OF_DOCUMENT, Export


@given(tokens=st.integers(2, 300), length=st.integers(1, 40), data=st.data())
def test_every_token_but_the_first_is_predicted_once(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))

    windows = windows_of(tokens, length, stride)

    predicted = [
        place + 1
        for window in windows
        for place in range(window.start + window.length - window.scored, window.start + window.length)
    ]
    assert predicted == list(range(1, tokens))
    assert all(window.length <= length for window in windows)
    # but for the first window, and the last one that the data cut short, as much context as promised
    assert all(window.length - window.scored >= length - stride for window in windows[1:-1])


def test_without_overlap_windows_are_the_samples_of_training() -> None:
    windows = windows_of(tokens=33, sequence_length=8, stride=8)

    assert [(window.start, window.length, window.scored) for window in windows] == [
        (0, 8, 8),
        (8, 8, 8),
        (16, 8, 8),
        (24, 8, 8),
    ]


def test_a_part_of_the_windows_is_spread_over_the_stream() -> None:
    windows = windows_of(tokens=1001, sequence_length=10, stride=10, max_tokens=50)

    assert [window.start for window in windows] == [0, 250, 500, 740, 990]
    assert sum(window.scored for window in windows) == 50


def test_separate_documents_are_evaluated_as_if_each_stood_alone(export: Export) -> None:
    loaded = replace(load_model(export.folder), separate_documents=True)
    policies = {"threshold": ExpertPolicy("threshold", expert_threshold=0.9)}
    options = WindowOptions(sequence_length=32, batch_size=3).checked(loaded)

    together = sweep(loaded, policies, make_batches(open_streams([export.data], loaded), options))["threshold"]

    alone = []
    for window in windows_of(len(export.ids), 32, 32):
        ids = export.ids[window.start : window.start + window.length + 1]
        ends = (ids[:-1] == END_OF_DOCUMENT).nonzero().flatten() + 1
        for piece in torch.tensor_split(ids, ends):
            stream = Stream("piece", piece.numpy(), END_OF_DOCUMENT)
            if len(piece) > 1:
                alone.append(sweep(loaded, policies, make_batches([stream], options))["threshold"])
    assert len(alone) > 6
    total = sum(piece.losses["piece"] for piece in alone)
    assert together.losses[export.data] == pytest.approx(total, rel=1e-6)
    assert together.scored[export.data] == sum(piece.scored["piece"] for piece in alone)


def test_text_gives_the_same_tokens_as_its_dataset(export: Export) -> None:
    loaded = load_model(export.folder)

    dataset, text = open_streams([export.data, str(export.text)], loaded)

    assert text.ids.tolist() == dataset.ids.tolist()
    assert text.end_of_document_id == dataset.end_of_document_id == END_OF_DOCUMENT


def test_a_plain_text_file_is_one_document(export: Export, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "plain.txt"
    path.write_text("ab\nc")

    [stream] = open_streams([str(path)], load_model(export.folder))

    assert len(stream.ids) == 5
    assert stream.ids[-1] == END_OF_DOCUMENT
