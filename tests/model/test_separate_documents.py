"""Documents that share a sample but must not see each other: as if each were a sample of its own."""

import torch
from torch import Tensor

from dsmoe_megatron.model.core_attention import document_starts
from tests.training_jobs import SEQUENCE_LENGTH, positions_in_documents, text_batch, tiny_config
from tests.worker_pool import WorkerPool


def packed_and_apart() -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Logits of a packed batch, those of its documents one by one, and the gradients of a function of each."""
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    # the mutual-information loss is taken over a micro-batch, which is not the same here
    config = tiny_config({"mi_alpha_attention": 0.0, "mi_alpha_mlp": 0.0}, data={"separate_documents": True})
    with model_parallel_groups(config.parallel, config.train.seed):
        chunk = MegatronEngine(config, torch.device("cpu")).chunks[0].module
        tokens_BS = text_batch(0, 4)[:, :-1]
        positions_BS = torch.stack([positions_in_documents(tokens_S) for tokens_S in tokens_BS])
        weights_BSV = torch.randn(4, SEQUENCE_LENGTH, config.model.padded_vocab_size)

        packed_BSV = chunk(tokens_BS, positions_BS, document_starts(positions_BS, 0, 1))
        rows = []
        for tokens_S, positions_S in zip(tokens_BS, positions_BS, strict=True):
            first = (positions_S == 0).nonzero().flatten().tolist()
            lengths = torch.tensor([*first, SEQUENCE_LENGTH]).diff().tolist()
            parts = [chunk(part[None], torch.arange(len(part))[None], None) for part in tokens_S.split(lengths)]
            rows.append(torch.cat(parts, dim=1))
        apart_BSV = torch.cat(rows)
        gradients = []
        for logits_BSV in (packed_BSV, apart_BSV):
            values = torch.autograd.grad((logits_BSV * weights_BSV).sum(), list(chunk.parameters()))
            gradients.append(dict(zip([name for name, _ in chunk.named_parameters()], values, strict=True)))
        return packed_BSV.detach(), apart_BSV.detach(), gradients


def test_equal_documents_apart(worker_pool: WorkerPool) -> None:
    ((packed_BSV, apart_BSV, (packed, apart)),) = worker_pool.run(1, packed_and_apart)

    torch.testing.assert_close(packed_BSV, apart_BSV, rtol=1e-5, atol=1e-5 * float(apart_BSV.abs().max()))
    for name, gradient in apart.items():
        assert float((packed[name] - gradient).abs().max() / gradient.abs().max()) < 1e-5, name


def test_a_sample_has_several_documents() -> None:
    positions_BS = torch.stack([positions_in_documents(tokens_S) for tokens_S in text_batch(0, 4)[:, :-1]])

    assert int((positions_BS == 0).sum()) > 8


def test_starts_follow_the_ranks_chunks() -> None:
    positions_BS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])

    assert document_starts(positions_BS, 0, 1).tolist() == [[0, 0, 0, 3, 3, 5, 5, 5]]
    assert document_starts(positions_BS, 0, 2).tolist() == [[0, 0, 5, 5]]
    assert document_starts(positions_BS, 1, 2).tolist() == [[0, 3, 3, 5]]
