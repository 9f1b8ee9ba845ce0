"""The bridge computes what torch computes, and names all that it cannot at once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn import functional

from runtime.backends import jax_operators
from runtime.backends.errors import BuildFailed, InputRefused
from runtime.backends.jax_bridge import held_tensors, to_jax
from runtime.backends.xla_export import check_types, export_portable
from runtime.backends.xla_platform import client
from runtime.backends.xla_program import Argument, PortableProgram, read_module
from traces.failures import FailureClass


@pytest.fixture(scope="module", autouse=True)
def _set_up() -> None:
    client(1)


class Encoder(nn.Module):
    """Attention, norms, activations and reshapings of a small text encoder."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.register_buffer("bias", torch.linspace(-1, 1, 8))
        self.to(dtype)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.embed(ids)) + self.bias
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        looked = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + functional.gelu((seen + looked).transpose(1, 2).flatten(2))
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        scores = torch.softmax(self.out(pooled), -1)
        return scores, scores.argmax(-1), x[:, 0], torch.where(mask, 1.0, -1.0), x[:, -1:].squeeze(1).tanh()


class Small(nn.Module):
    """One function of tensors."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.call(x, y)


def answers(module: nn.Module, *inputs: Tensor) -> tuple[list[np.ndarray], list[Tensor]]:
    """What JAX and torch answer."""
    exported = export(module.eval(), inputs)
    program = to_jax(exported)
    tensors = held_tensors(exported)
    import jax

    given = [jax.dlpack.from_dlpack(tensors[program.sources[name]]) for name in program.held]
    found = jax.jit(program.call)(*given, *[jax.dlpack.from_dlpack(entry.contiguous()) for entry in inputs])
    with torch.no_grad():
        expected = module(*inputs)
    return [np.asarray(entry) for entry in found], list(expected if isinstance(expected, tuple) else (expected,))


def assert_same(found: list[np.ndarray], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert str(theirs.dtype).removeprefix("torch.") == str(ours.dtype), "torch's promotion rules hold"
        np.testing.assert_allclose(
            ours.astype(np.float64), theirs.double().numpy(), atol=tolerance, rtol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_an_encoder_answers_as_torch_does(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (3, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    found, expected = answers(Encoder(dtype), ids, mask)
    assert_same(found, expected, tolerance)


X, Y = torch.linspace(-2, 2, 24).reshape(2, 3, 4), torch.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: (y * 2.5, y + 1, x + y, y / 2, y // 5, x.pow(2).sqrt(), (-x).exp(), x.sigmoid(), 3 - x),
        lambda x, y: (x.mean((0, 2)), x.sum(-1, keepdim=True), y.sum(), x.amax(-1), x.cumsum(1), (y > 5).any(-1)),
        lambda x, y: (x.chunk(3, -1)[1], *x.split(3, -1), *x.split([1, 3], 2), *x.unbind(1)),
        lambda x, y: (x[:, 1:, ::2], x[..., -1], x[:, :99], x.index_select(1, y[0, 0, :2]), x[y[0, 0, :2]]),
        lambda x, y: (torch.cat([x, x], 1), torch.stack([x, x], 1), x.expand(5, 2, 3, 4), x.permute(2, 0, 1)),
        lambda x, y: (x @ x.transpose(1, 2), x[0] @ x[0].t(), torch.addmm(x[0, :, :3], x[0], x[0].t(), beta=2.0)),
        lambda x, y: (x.masked_fill(y > 7, float("-inf")).softmax(-1), x.log_softmax(1), x.relu(), x.clamp(-1, 1)),
        lambda x, y: (torch.ones_like(y), torch.full((2,), 3), torch.zeros(2, 2), torch.arange(2, 9, 3), x.tril(1)),
        lambda x, y: ((y % 2 == 0) & (y > 3), ~(x > 0), x.long(), x.repeat(2, 1, 1), y.float(), x.abs().log()),
        lambda x, y: (functional.rms_norm(x, (4,)), functional.layer_norm(x, (3, 4)), x.repeat_interleave(2, 1)),
        lambda x, y: (x.gather(-1, y[:1, :2, :3] % 4), x.gather(0, y[:, :2, :1] % 2)),
        lambda x, y: (functional.scaled_dot_product_attention(x[None], x[None, :1], x[None, :1], enable_gqa=True),),
    ],
)  # fmt: skip
def test_operators_answer_as_torch_does(call: Any) -> None:
    found, expected = answers(Small(call), X, Y)
    assert_same(found, expected, 1e-6)


def test_every_unsupported_operator_is_named_at_once_with_its_place() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv1d(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.inner(x)).real.erfinv()

    with pytest.raises(BuildFailed, match="conv1d") as caught:
        to_jax(export(Filter(), (torch.ones(2, 3, 4),)))
    error = caught.value
    assert (error.failure_class, error.stage) == (FailureClass.ARTIFACT_COMPATIBILITY, "a01")
    assert {"aten.conv1d.default", "aten.fft_rfft.default", "aten.erfinv.default"} <= set(
        error.evidence["operator_details"].split(", ")
    )
    assert "inner" in error.evidence["validation_output"]


def portable(module: nn.Module) -> tuple[Any, PortableProgram]:
    rows = Dim("rows", min=1, max=9)
    exported = export(module, (torch.ones(3, 4), torch.ones(6, 4)), dynamic_shapes=({0: rows}, {0: 2 * rows}))
    symbol = str(next(node for node in exported.graph.nodes if node.name == "x").meta["val"].shape[0])
    return exported, export_portable(exported, {symbol: "R"})


class Dropping(nn.Module):
    """Drops attention weights, and has a name inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Attending()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)


class Attending(nn.Module):
    """Attention with dropout that eval mode does not switch off."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


class Cubic(nn.Module):
    """A norm of an order that the table does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, ord=3, dim=-1)


@pytest.mark.parametrize(
    ("model", "operator", "why"),
    [
        (Dropping(), "aten.scaled_dot_product_attention.default in mixer", "dropout"),
        (Cubic(), "aten.linalg_vector_norm.default in the model", "order 3"),
    ],
)
def test_a_use_that_an_operator_does_not_take_is_a_failed_build_that_names_it(
    model: nn.Module, operator: str, why: str
) -> None:
    with pytest.raises(BuildFailed, match=why) as caught:
        export_portable(export(model.eval(), (torch.ones(2, 3, 4),)), {})
    assert operator in caught.value.message
    assert "NotImplementedError" not in caught.value.message
    assert caught.value.failure_class is FailureClass.ARTIFACT_COMPATIBILITY
    assert caught.value.stage == "a01"
    assert operator.partition(" ")[0] in caught.value.evidence["operator_details"]
    assert "onnxruntime" in (caught.value.fix or "")


def test_what_jax_itself_refuses_is_named_by_the_operator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {**jax_operators.OPERATORS, torch.ops.aten.relu.default: lambda x: jnp.matmul(x, jnp.ones((99, 99)))}
    monkeypatch.setattr("runtime.backends.jax_bridge.OPERATORS", planted)
    with pytest.raises(BuildFailed, match=r"aten\.relu\.default in the model as it is used: .*dot_general") as caught:
        portable(Small(lambda x, y: (x.relu(), y)))
    assert caught.value.evidence["exception"] == "TypeError"


def test_a_portable_program_keeps_bounds_order_and_types() -> None:
    exported, program = portable(Small(lambda x, y: x.sum() + y))
    assert program.inputs == (
        Argument("x", "float32", ((1, "R"), (4, None))),
        Argument("y", "float32", ((2, "R"), (4, None))),
    )
    module = read_module(program.blob)
    assert module.bounds == {"R": [1, 9]}
    assert "f64" not in module.types
    check_types(module.types, exported, stage="a03")
    from manifests.canonical import canonical_bytes

    text = canonical_bytes(program.document()).decode()
    assert PortableProgram.read(program.blob, text) == program
    assert program.shapes({"R": 2})[1].shape == (4, 4)


def test_a_portable_program_is_the_same_wherever_it_is_asked_for() -> None:
    """Source lines of the caller stand in a module unless they are kept out, and packages would name folders."""
    module = Small(lambda x, y: x.sum() + y)

    def deeper(calls: int) -> bytes:
        return deeper(calls - 1) if calls else portable(module)[1].blob

    assert deeper(3) == portable(module)[1].blob
    assert b".py" not in deeper(1)


def test_a_size_that_is_no_multiple_of_a_symbol_is_refused() -> None:
    rows = Dim("rows", min=2, max=9)
    exported = export(
        Small(lambda x, y: x.sum() + y), (torch.ones(3, 4), torch.ones(4, 4)), dynamic_shapes=({0: rows}, {0: rows + 1})
    )
    with pytest.raises(BuildFailed, match="no multiple of one symbol"):
        export_portable(exported, {})


def test_a_silent_promotion_to_float64_fails_stage_three(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {**jax_operators.OPERATORS, torch.ops.aten.mul.Tensor: lambda x, y: x * y * np.float64(1)}
    monkeypatch.setattr("runtime.backends.jax_bridge.OPERATORS", planted)
    exported, program = portable(Small(lambda x, y: x.sum() * y))
    with pytest.raises(InputRefused, match="float64") as caught:
        check_types(read_module(program.blob).types, exported, stage="a03")
    assert (caught.value.failure_class, caught.value.stage) == (FailureClass.SHAPE_GUARD, "a03")
