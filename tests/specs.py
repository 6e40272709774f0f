"""Specs for tests, in a word each."""

from __future__ import annotations

from compat_restore.tensors import DType, TensorSpec

F32 = DType.float32


def spec(name: str, *shape: int | None, dtype: DType = F32, aliases: tuple[str, ...] = ()):
    return TensorSpec(name, dtype, shape, aliases=aliases)


def specs(*members: TensorSpec | str) -> dict[str, TensorSpec]:
    """Return specs by name; a name alone has shape [2,3]."""
    made = [spec(member, 2, 3) if isinstance(member, str) else member for member in members]
    return {member.name: member for member in made}
