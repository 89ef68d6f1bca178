"""Which base an adapter belongs to: where it was, and a fingerprint of its weights to know it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import LlavaConfig

from geochat.model.checkpoint import fingerprint
from geochat.model.formats.adapters import Adapter
from geochat.model.formats.gguf_file import is_gguf
from geochat.model.processor import Processor
from geochat.model.weights import State, read_json

FILE = "geochat_base.json"
_PATHS = ("model", "vision_tower", "projector")


@dataclass(frozen=True)
class BaseRecord:
    """The base an adapter belongs to: a canonical folder, or the parts that a model was built from."""

    model: Path
    vision_tower: Path | None = None
    projector: Path | None = None
    fingerprint: str | None = None

    @classmethod
    def of(
        cls, model: Path | str, vision_tower: Path | str | None = None, projector: Path | str | None = None
    ) -> BaseRecord:
        """The record of folders as they are now."""
        return cls(
            Path(model).absolute(),
            Path(vision_tower).absolute() if vision_tower else None,
            Path(projector).absolute() if projector else None,
            base_fingerprint(model, vision_tower),
        )

    @classmethod
    def read(cls, folder: Path) -> BaseRecord:
        """From an adapter folder; one that another program wrote names the base in adapter_config.json only."""
        if (folder / FILE).exists():
            value = read_json(folder / FILE)
            paths = {name: Path(value[name]) if value.get(name) else None for name in _PATHS}
            return cls(**paths, fingerprint=value.get("fingerprint"))  # type: ignore[arg-type]
        value = read_json(folder / "adapter_config.json")
        return cls(Path(value.get("base_model_name_or_path") or ""))

    def write(self, folder: Path) -> None:
        """As JSON into an adapter folder."""
        value = {name: str(item) if item is not None else None for name, item in asdict(self).items()}
        (folder / FILE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def moved_to(self, model: Path | str | None, vision_tower: Path | str | None) -> BaseRecord:
        """The same base at the places the user names. Raises ValueError when it is not there or not the same."""
        record = BaseRecord(
            Path(model or self.model),
            Path(vision_tower) if vision_tower else self.vision_tower,
            self.projector,
            self.fingerprint,
        )
        for flag, folder in (("--model-base", record.model), ("--vision-tower", record.vision_tower)):
            if folder is not None and not folder.is_dir() and not is_gguf(folder):
                raise ValueError(f"the adapter's base {folder} is not there; say where it is with {flag}")
        if self.fingerprint and base_fingerprint(record.model, record.vision_tower) != self.fingerprint:
            raise ValueError(f"{record.model}: not the base this adapter was trained on (its weights differ)")
        return record


@dataclass(frozen=True)
class OnBase:
    """An adapter of any program beside its base, neither of them read yet."""

    config: LlavaConfig
    state: State
    """The base's tensors, under canonical names."""
    processor: Processor
    adapter: Adapter
    model: Path
    """The base's folder."""
    vision_tower: Path | None = None
    """The CLIP folder, where the base was put together with one."""

    def merged(self) -> tuple[LlavaConfig, State, Processor]:
        """The whole model, merged when it is read."""
        return self.config, self.adapter.applied(self.state), self.processor


def base_fingerprint(model: Path | str, vision_tower: Path | str | None = None) -> str:
    """Fingerprint of a base: of its model folder, and of the CLIP folder where it was built from parts."""
    own = fingerprint(model)
    return f"{own}+{fingerprint(vision_tower)}" if vision_tower else own
