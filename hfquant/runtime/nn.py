"""Linear layers and embeddings that keep their weight packed."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..tensors import formats
from ..tensors.encoding import Encoding
from ..tensors.formats import Format
from ..tensors.grid import Grid
from ..tensors.layer import Quantized
from . import cache, kernels, ops, together  # noqa: F401  (ops registers torch.ops.hfquant)
from .declare import declare, keep_dtype
from .reference import Matrix, dense
from .view import ReadOnlyWeightError, WeightView


class Packed(nn.Module):
    """What a packed matrix [out, in] is made of, whatever layer it belongs to."""

    encoding: Encoding
    fmt: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    components: tuple[str, ...]
    _matrix: tuple[str, str, int, int]  # how the operators name the weight

    def _declare(
        self,
        shape: tuple[int, int],
        encoding: Encoding,
        fmt: Format,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        device: Any,
    ) -> None:
        self.shape, self.encoding, self.fmt, self.dtype = shape, encoding, fmt, dtype
        self.components = declare(self, fmt.spec(encoding, shape, scale_dtype), device)
        self._matrix = (fmt.name, str(encoding), *shape)

    @property
    def grid(self) -> Grid:
        """Of the weights."""
        return self.encoding.grid

    @property
    def matrix(self) -> Matrix:
        """The packed weight, as what reads it takes it."""
        return Matrix(self.parts, self.fmt, self.encoding, self.shape)

    @property
    def parts(self) -> list[Tensor]:
        """The components, in the order in which the operators take them."""
        return [self._parameters[name] for name in self.components]  # type: ignore[misc]

    def fill(self, Q: Quantized) -> None:
        """Store Q in the place of what the components are now."""
        for name, tensor in self.fmt.pack(Q).items():
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def quantized(self) -> Quantized:
        """All that this layer holds."""
        return self.matrix.quantized()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight [out, in] for the input as it comes: rounding of activations is lost."""
        return dense(self.quantized(), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        cache.forget(self.parts)
        super()._apply(keep_dtype(fn, self.parts), recurse)
        if not self.parts[0].is_meta:
            self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def direct(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody watches: no gradient, no trace, no transform.

    They need the operator, which costs more than a small layer.
    """
    needed = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return (
        type(x) is Tensor
        and not needed
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class QLinear(Packed, nn.Linear):
    """y = x Wᵀ + b with W packed.  x [..., in] -> [..., out] in x's dtype.

    A subclass of nn.Linear so that PEFT takes it for one; nn.Linear.__init__, which would allocate a dense
    weight, is not called.  `transposed`: the model's own layer is a Conv1D, which stores [in, out].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        encoding: Encoding,
        fmt: Format,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self._declare((out_features, in_features), encoding, fmt, scale_dtype, dtype, device)
        self.register_parameter("bias", None)
        if bias:
            declare(self, {"bias": ((out_features,), dtype)}, device)

    @classmethod
    def from_quantized(cls, Q: Quantized, bias: Tensor | None, fmt: Format, dtype: torch.dtype) -> Self:
        """A layer that holds Q.  Raises FormatError if the format cannot store it."""
        formats.check(fmt.name, {"this layer": (Q.encoding, Q.shape, "linear")})
        out_features, in_features = Q.shape
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            encoding=fmt.keeps(Q.encoding),
            fmt=fmt,
            scale_dtype=Q.scale.dtype,
            dtype=dtype,
        )
        layer.fill(Q)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parts, bias = self.parts, self._parameters["bias"]
        if not direct(x, bias):
            y: Tensor = torch.ops.hfquant.linear(x, bias, parts, *self._matrix)
            return y
        bound: kernels.Bound | None = cache.entry(parts).derived.get(kernels.place(x))
        if bound is not None and x.is_contiguous() and (bias is None or bias.dtype == x.dtype):
            return bound(x, bias)
        return together.linear(x, self.matrix, bias)

    def __getattr__(self, name: str) -> Any:
        # nn.Module comes here for whatever is not in __dict__ or on the class: parameters, and our view
        if name == "weight" and "weight" not in self._parameters:
            return self._view()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_matrix" in self.__dict__ and "weight" not in self._parameters:
            raise ReadOnlyWeightError(
                "the weight of a compressed layer is packed and cannot be replaced",
                "call `model.dequantize()` first (for instance before merging an adapter)",
            )
        super().__setattr__(name, value)

    def _view(self) -> Tensor:
        parts, arguments = self.parts, (*self._matrix, self.dtype)

        def decode() -> Tensor:
            W: Tensor = torch.ops.hfquant.weight(parts, *arguments)
            return W

        if torch.compiler.is_compiling():
            return decode()  # if only its dtype is read, the graph drops it again
        return WeightView.of(self.shape, self.dtype, parts[0].device, decode)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.encoding}, {self.fmt.name}"


class QEmbedding(Packed, nn.Embedding):
    """A table whose rows are gathered packed and decoded.  ids [...] -> [..., embedding_dim]

    A head tied to the table is a QLinear with the same Parameter objects.  `factor` multiplies what is looked
    up (BART, Gemma); Gemma rounds it to the model's dtype first (`round_factor`), and trained with that.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        encoding: Encoding,
        fmt: Format,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
        padding_idx: int | None = None,
        factor: float | None = None,
        round_factor: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        shape = (num_embeddings, embedding_dim)
        formats.check(fmt.name, {"this embedding": (encoding, shape, "embedding")})
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._declare(shape, encoding, fmt, scale_dtype, dtype, device)
        self.factor, self.round_factor = factor, round_factor
        # the dense module this one stands for, without weights; in a tuple, so that it is no submodule
        self.origin: tuple[nn.Module] | None = None

    @classmethod
    def from_quantized(cls, Q: Quantized, fmt: Format, dtype: torch.dtype) -> Self:
        """A table that holds Q.  Raises FormatError if the format cannot store it."""
        table = cls(*Q.shape, encoding=Q.encoding, fmt=fmt, scale_dtype=Q.scale.dtype, dtype=dtype)
        table.fill(Q)
        return table

    def forward(self, ids: Tensor) -> Tensor:
        values: Tensor = torch.ops.hfquant.embedding(ids, self.parts, *self._matrix, self.dtype)
        if self.factor is not None:
            values = values * (torch.tensor(self.factor, dtype=self.dtype) if self.round_factor else self.factor)
        return values

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.encoding}, {self.fmt.name}"
