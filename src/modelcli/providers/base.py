"""What a provider declares: all that has to be known of a library's models before torch, or that library, is imported.

A provider turns references of one kind into models. This is its torch-free half; the other one, which builds, is a
`modelcli.live.providers.LiveProvider` that `live` names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from modelcli import installed
from modelcli.language.quoting import quoted

if TYPE_CHECKING:
    from pathlib import Path

    from modelcli.language.expressions import Call
    from modelcli.providers.published import PublishedModel


class Provider:
    """A library of models: the half of its declaration that needs no torch.

    Subclass it, set the attributes, and override the methods that apply to the library. Commands that show a file,
    completion and `list` call these methods, so they must read at most small texts on the disk, and import neither
    torch nor the library.
    """

    #: The name of its library, for messages.
    name: ClassVar[str]
    #: The class of its torch half, `package.module:Class`, a subclass of `modelcli.live.providers.LiveProvider`.
    live: ClassVar[str]
    #: The part of its references before the colon: `timm` in `timm:resnet50`. None for the built-in providers whose
    #: models need no prefix.
    prefix: ClassVar[str | None] = None
    #: Whether its models have names, which `names` returns: `list` shows them, and `identify` compares with them.
    has_names: ClassVar[bool] = False
    #: Whether building all its models takes minutes. Then `list` shows them only for a pattern with the prefix, and
    #: counts their parameters itself; and `identify` builds only those that `names_like` returns.
    has_many_models: ClassVar[bool] = False
    #: The kind of its models for `--help`, with an example: `a timm model (timm:resnet50)`.
    title: ClassVar[str] = ""
    #: The names of its installed packages. Their versions are part of the cache keys of blueprints and lists, because
    #: they decide what is built. `--version` shows those of the built-in providers.
    packages: ClassVar[tuple[str, ...]] = ()
    #: The extra of modelcli that installs its libraries: `timm` in `pip install modelcli[timm]`; None if there is none.
    extra: ClassVar[str | None] = None
    #: The package whose module classes an expression may write without a package, for messages: `torch.nn`.
    classes_from: ClassVar[str | None] = None
    #: The names that its import lines define in a script. A user's module or class gets another name there.
    script_names: ClassVar[frozenset[str]] = frozenset()

    def names(self) -> Sequence[str]:
        """Return the names of its models without the prefix, read from the installed library's sources."""
        return ()

    def full_names(self) -> Sequence[str]:
        """Return the names for completion: those of `names`, and longer ones, such as names with tags."""
        return self.names()

    def at_hand(self) -> tuple[Sequence[PublishedModel], str]:
        """The models on this machine of a provider that cannot list all of its own: see `has_names`.

        `list` shows them for a pattern with the prefix. Neither torch nor a network is used.

        Returns:
            The models, each by its name behind the prefix; and the place where they are, for messages, which is empty
            for a provider without such a place.

        Raises RequestError where a library is not installed that knows them.
        """
        return (), ""

    def names_like(self, keys: Collection[str]) -> Sequence[Sequence[str]]:
        """Return those of `names` that a checkpoint with these keys may belong to, in groups, the likeliest first.

        It is called if `has_many_models` is set: `identify` builds one group after another, and stops after the first
        group with a model that fits.
        """
        return [self.names()]

    def weights_names(self) -> Sequence[str]:
        """Return all names of pretrained weights that `--weights` accepts for its models."""
        return ()

    def weights_names_of(self, name: str) -> Sequence[str]:
        """The names of the pretrained weights of one model, for completion; nothing is imported or built for it."""
        return self.weights_names()

    def class_names(self) -> Sequence[str]:
        """Return the module classes that expressions may write without a package."""
        return ()

    def bare_words(self) -> Sequence[str]:
        """Return the words that mean a model even if a file has this name. Used for providers without a prefix."""
        return self.names()

    def owns(self, package: str) -> bool:
        """Whether module classes in a package (given by its dotted name) are part of the library.

        Expressions and records may name such classes without `--trust`, because looking one up runs only the library.
        """
        return False

    def is_known_code(self, name: str) -> bool:
        """Whether a record in a file may name this model without `--trust`.

        Return True only if building the model runs the code of the installed library and no code from a file. It is
        called for providers with a prefix. The arguments of the model are checked separately.

        Args:
            name: the name of the model, without its arguments.
        """
        return False

    def recognises(self, folder: Path) -> bool:
        """Whether a folder that is given by its path is one of its models, and not a plain checkpoint.

        If so, the path is the model's name after the prefix: `runs/bert` means `PREFIX:runs/bert`. It is called for
        every folder that a command opens, so it should only look for a file by its name.
        """
        return False

    def compare_with_tensors(
        self, folder: Path, tensors: Mapping[str, tuple[Sequence[int] | None, str]]
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Compare the configuration of a folder, and the other texts in it, with the tensors of its weights.

        Args:
            folder: a folder that the provider recognises.
            tensors: the shape and the dtype of each tensor, by its key in the files.

        Returns:
            The names of the files that were compared, and a sentence for each fault.

        Raises:
            FileFormatError: the configuration cannot be read.
        """
        return (), ()

    def own_folder(self, name: str, folder: Path) -> Path | None:
        """Return the folder of a model that is an architecture and a checkpoint in one; None for other models.

        The weights in the folder are the model's default values.

        Args:
            name: the name of the model in its reference.
            folder: a relative path in the name starts here.
        """
        return None

    def excess(self, call: Call, folder: Path, modules: int) -> str | None:
        """Return why a model is too large to build, if its files show this; otherwise None.

        It is called before torch and the library are imported, which takes seconds.

        Args:
            call: the model and its arguments in the reference.
            folder: a relative path in the name starts here.
            modules: the largest number of modules that a model may have.

        Returns:
            The end of a sentence whose subject is the configuration of the model.
        """
        return None

    def is_remote(self, name: str) -> bool:
        """Whether a name means a remote model, and never a folder of this name."""
        return False

    def pinned(self, name: str, folder: Path, *, requests: bool = True) -> str:
        """Return a name of the same model that cannot change while a command works on it, such as one with its commit.

        This downloads the texts that describe the model, but not its values.

        Args:
            name: the name of the model in its reference.
            folder: a relative path in the name starts here.
            requests: whether the network may be used. Without it, the name of an unknown model is returned unchanged.

        Raises:
            RequestError: there is no such model.
            SystemFailureError: the model cannot be reached.
        """
        return name

    def downloaded(self, name: str, folder: Path) -> str:
        """Download the values of the model too, so that it has an `own_folder`. Returns a name as `pinned` does."""
        return self.pinned(name, folder)

    def is_partial(self, name: str, folder: Path) -> bool:
        """Whether the weights of a remote model are not in its `own_folder` yet."""
        return False

    def chosen_weights(self, folder: Path) -> Path:
        """Return what the library loads from a folder with weights: the file that it prefers, or the whole folder."""
        return folder

    def identity(self, name: str, folder: Path) -> str | None:
        """Return a cache key of the files that a model is built from. A cached blueprint is valid while it is the same.

        None for a model that depends only on its name, or that must not be cached: see `is_known_code`.

        Args:
            name: the name of the model in its reference.
            folder: a relative path in the name starts here.
        """
        return None

    @property
    def is_installed(self) -> bool:
        """Whether all its libraries are installed."""
        return not self.missing_packages

    @property
    def missing_packages(self) -> list[str]:
        """The names of its packages that are not installed."""
        return [package for package in self.packages if installed.version(package) is None]

    @property
    def install_command(self) -> str:
        """The command that installs the missing packages, for a hint."""
        wanted = [f"modelcli[{self.extra}]"] if self.extra is not None else self.missing_packages
        return f"pip install {' '.join(map(quoted, wanted))}"

    def parse(self, text: str) -> Call:
        """Parse the text after the prefix: `NAME` or `NAME(arguments)`. The name is everything before the parenthesis.

        Raises:
            RequestError: the text names no model, or an argument is not a literal.
        """
        from modelcli.language import expressions

        return expressions.parse_named(text)
