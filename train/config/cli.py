"""The command line over a training configuration."""

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple, NoReturn

import tyro

from train.config.sections import TrainConfig
from vxl_jax.errors import ConfigError


@dataclass(frozen=True)
class _CommandLine:
    config: str
    """A configuration: the name of a module in configs/, or a Python file."""
    run_dir: str | None
    """Short for --run.run-dir."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]


Prepare = Callable[[TrainConfig], None]
"""Makes or fetches the data of a configuration."""


class LoadedConfig(NamedTuple):
    """What a command line asks for."""

    config: TrainConfig
    """Paths in it may still contain `{run_dir}`."""
    prepare: Prepare | None
    """What the configuration's module defines, if it does."""


class OwnOptions(ArgumentParser):
    """Options of a command that are not fields of a configuration."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            usage="%(prog)s [options] [options of the configuration]",
            epilog="The options of the configuration follow.",
            add_help=False,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit status 2."""
        _refuse(message)

    def split(self, argv: Sequence[str]) -> tuple[Namespace, list[str]]:
        """These options, and the others, for `load_config`.

        Anything wrong is one message on stderr and SystemExit(2); `--help` prints these options.
        """
        found, rest = self.parse_known_args(list(argv))
        if {"-h", "--help"} & set(rest):
            self.print_help()
            print(flush=True)
        own = [name for action in self._actions for name in action.option_strings]
        for argument in rest:
            name = argument.partition("=")[0].replace("_", "-")
            near = difflib.get_close_matches(name, own, 1, 0.75)
            if name.startswith("--") and near:
                self.error(f"there is no option {name}; did you mean {near[0]}?")
        return found, rest


def load_config(
    argv: Sequence[str],
    default: str = "demo",
    prog: str = "train.finetune",
    description: str = "Train Video-XL.",
) -> LoadedConfig:
    """Read `--config NAME_OR_FILE`, `--run-dir DIR`, `--moved` and `--section.field value`.

    Anything wrong is one message on stderr and SystemExit(2); `--help` prints all fields.
    """
    argv = [part for a in argv for part in (("--run.moved", "True") if a == "--moved" else (a,))]
    # An abbreviated option would hide a misspelled one.
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    name = parser.parse_known_args(argv)[0].config
    try:
        module = _import_config(name)
        config = _module_config(module, name)
        _check_names(argv)
        command = tyro.cli(
            tyro.conf.configure(tyro.conf.FlagConversionOff)(_CommandLine),
            prog=f"python -m {prog}",
            description=description,
            args=list(argv),
            default=_CommandLine(name, None, config),
        )
        config = command.settings
        if command.run_dir is not None:
            run = dataclasses.replace(config.run, run_dir=command.run_dir)
            config = dataclasses.replace(config, run=run)
    except ConfigError as error:
        _refuse(str(error))
    return LoadedConfig(config, getattr(module, "prepare", None))


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _import_config(name: str) -> ModuleType:
    if name.endswith(".py") or "/" in name:
        if not Path(name).is_file():
            raise ConfigError(f"--config {name}: there is no such file")
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None:
            raise ConfigError(f"--config {name}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's file may do anything
            raise ConfigError(f"--config {name}: {type(error).__name__}: {error}") from error
        return module
    import configs

    names = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    if name not in names:
        raise ConfigError(
            f"--config {name}: there is no such configuration; there are {', '.join(names)}, "
            "or give the path of a .py file"
        )
    return importlib.import_module(f"configs.{name}")


def _module_config(module: ModuleType, name: str) -> TrainConfig:
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        found = (
            "has no CONFIG" if config is None else f"has a CONFIG of type {type(config).__name__}"
        )
        raise ConfigError(f"--config {name}: the module {found}; it must be a TrainConfig")
    return config


def _check_names(argv: Sequence[str]) -> None:
    """Refuse an unknown option with the nearest one; a field without its section is near too."""
    known = ["--config", "--run-dir", "--help"]
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(section.type):  # type: ignore[arg-type]
            known.append(f"--{section.name}.{field.name}".replace("_", "-"))

    def likeness(option: str, name: str) -> float:
        full = difflib.SequenceMatcher(None, option, name).ratio()
        field = difflib.SequenceMatcher(None, option.lstrip("-"), name.split(".")[-1]).ratio()
        return max(full, field)

    for argument in argv:
        option = argument.split("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            nearest = max(known, key=lambda name: likeness(option, name))
            raise ConfigError(f"there is no option {option}; did you mean {nearest}?")
