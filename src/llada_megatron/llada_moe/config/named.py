"""What a name can stand for: models, runs, clusters and recovery policies, each a YAML file in a folder of its kind.

A name is the stem of a file; the path of a YAML file can stand in its place. The package holds the folder `configs` of
the repository as data. A file, or a mapping in a run, may name a `base` of the same kind whose keys it changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from llada_megatron.llada_moe.config import yaml_nodes
from llada_megatron.llada_moe.config.parsing import closest
from llada_megatron.llada_moe.errors import ConfigError

SHIPPED = Path(str(resources.files("llada_megatron") / "configs"))
"""The folder with the configurations that come with the package; it holds a folder of each kind."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Named:
    """One kind of file: `what` it holds, as messages say it, and the folder of configs/ with the files of this kind."""

    what: str
    directory: str

    def load(self, name_or_path: str) -> yaml.Node:
        """The content of a file, its bases laid under it.

        Raises:
            ConfigError: there is no such file (lists the known ones), or it cannot be read.
        """
        return self._content(self._existing(name_or_path, Path(), ""), ())

    def files(self, name: str) -> list[Path]:
        """The files of a name that is not written in a file: the first is the one it stands for."""
        return [file for file in self._candidates(name, Path()) if file.is_file()]

    def names(self) -> list[str]:
        """The names of the files that come with the package."""
        return sorted(file.stem for file in (SHIPPED / self.directory).glob("*.yaml"))

    def unknown(self, name: str, directory: Path = Path()) -> str:
        """The message for a name that stands for nothing: the most similar one, or all that come with the package."""
        near = closest(Path(name).stem, self.neighbours(name, directory))
        known = self.names()
        return f"no {self.what} {name!r}" + (near or (f"; known: {', '.join(known)}" if known else ""))

    def neighbours(self, name: str, directory: Path = Path()) -> list[str]:
        """The names of all files in the folders in which a name is looked for."""
        files = [file for each in self._candidates(name, directory) for file in each.parent.glob("*.yaml")]
        return sorted({file.stem for file in files} - {Path(name).stem})

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
        file = self._existing(base.value, directory, where)
        if file.resolve() in chain:
            raise ConfigError(f"{where}: {base.value!r} is its own base")
        content = self._content(file, chain)
        return content if node is base else yaml_nodes.merged(content, yaml_nodes.without(node, "base"))

    def _existing(self, name: str, directory: Path, where: str) -> Path:
        for candidate in self._candidates(name, directory):
            if candidate.is_file():
                return candidate
        raise ConfigError((f"{where}: " if where else "") + self.unknown(name, directory))

    def _candidates(self, name: str, directory: Path) -> list[Path]:
        """Where a file may be: a path is relative to `directory`, then to the current folder; a name is looked for
        beside `directory`, then in configs/ of the current folder, then in the package."""
        if name.endswith(SUFFIXES):
            return [directory / name, Path(name)]
        beside = [directory / part for part in (f"../{self.directory}", self.directory, ".")]
        return [
            folder / f"{name}.yaml" for folder in (*beside, Path("configs") / self.directory, SHIPPED / self.directory)
        ]


MODELS, RUNS = Named("model", "models"), Named("run", "runs")
SECTIONS = {"model": MODELS, "recovery": Named("recovery policy", "recovery")}
"""Keys of a run that may hold a name."""
