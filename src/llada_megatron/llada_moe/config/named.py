"""Sections of a run that a name can stand for: the stem of a file in a directory of such files, or a YAML file's path.

A named file, or a mapping in the run, may name a `base` of the same kind whose keys it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from llada_megatron.llada_moe.config import yaml_nodes
from llada_megatron.llada_moe.config.parsing import closest
from llada_megatron.llada_moe.errors import ConfigError

REPOSITORY_CONFIGS = Path(__file__).resolve().parents[4] / "configs"


@dataclass(frozen=True)
class Named:
    """One kind of file: `what` it holds, as messages say it, and the directory of configs/ with the shipped ones."""

    what: str
    directory: str

    def load(self, name_or_path: str) -> yaml.Node:
        """The content of a file, its bases laid under it.

        Raises:
            ConfigError: there is no such file (lists the known ones), or it cannot be read.
        """
        return self._content(self._find(name_or_path, Path(), ""), ())

    def resolved(self, node: yaml.Node, directory: Path) -> yaml.Node:
        """`node`, written in a file of `directory`, with its name or its `base` replaced by the content of the file.

        Raises:
            ConfigError: as `load`; or a file is its own base.
        """
        return self._resolved(node, directory, ())

    def _content(self, file: Path, chain: tuple[Path, ...]) -> yaml.Node:
        return self._resolved(yaml_nodes.read_yaml(file), file.parent, (*chain, file.resolve()))

    def _resolved(self, node: yaml.Node, directory: Path, chain: tuple[Path, ...]) -> yaml.Node:
        base = node if isinstance(node, yaml.ScalarNode) else yaml_nodes.child(node, "base")
        if base is None:
            return node
        where = yaml_nodes.location(base.start_mark)
        if not isinstance(base, yaml.ScalarNode) or base.tag == yaml_nodes.NULL_TAG:
            raise ConfigError(f"{where}: expected the name of a {self.what} or the path of its YAML file")
        file = self._find(base.value, directory, where)
        if file.resolve() in chain:
            raise ConfigError(f"{where}: {base.value!r} is its own base")
        content = self._content(file, chain)
        return content if node is base else yaml_nodes.merged(content, yaml_nodes.without(node, "base"))

    def _find(self, name: str, directory: Path, where: str) -> Path:
        """A path is relative to `directory`, then to the current one; a name is looked for beside, then in configs/."""
        shipped = REPOSITORY_CONFIGS / self.directory
        if name.endswith((".yaml", ".yml")):
            candidates = [directory / name, Path(name)]
        else:
            beside = [directory / part for part in (f"../{self.directory}", self.directory, ".")]
            folders = [*beside, Path("configs") / self.directory, shipped]
            candidates = [folder / f"{name}.yaml" for folder in folders]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        files = [file for candidate in candidates for file in candidate.parent.glob("*.yaml")]
        known = sorted({file.stem for file in files} - {Path(name).stem})
        names = sorted(file.stem for file in shipped.glob("*.yaml"))
        listing = f"; known: {', '.join(names)}" if names else ""
        prefix = f"{where}: " if where else ""
        raise ConfigError(f"{prefix}no {self.what} {name!r}{closest(Path(name).stem, known) or listing}")


MODELS = Named("model", "models")
SECTIONS = {"model": MODELS, "recovery": Named("recovery policy", "recovery")}
"""Keys of a run that may hold a name."""
