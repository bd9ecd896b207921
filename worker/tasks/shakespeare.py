"""The next character of Shakespeare, spoken by many: `shakespeare/input.txt` under FEDMQ_DATA.

Each speaker is a client with a language of their own, as in LEAF; the last tenth of what each speaker says is held out.

Settings: those of every worked task (`Training` in `worker/tasks/options.py`) except `weight`; `seq`, the characters a
window has (default 80; evaluation always takes 80); `speakers`, how many of those with the most text take part
(default 0: as many as there are shares, one each); `characters`, the fewest a speaker may have (default 500). The
`partition` is `groups` by default; `iid` and `quantity` mix the speakers. An example is a window.

Source: the task, LEAF, Caldas et al., arXiv:1812.01097.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from shared.errors import SettingsError
from worker.local_sgd import local_sgd
from worker.task import Context, TrainResult
from worker.tasks.files import read_bytes
from worker.tasks.options import Data, dealt, read, share_for

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"  # all that occur
EMBEDDING, HIDDEN = 16, 128
HELD_OUT = 0.1  # of each speaker's text, at its end
EVALUATED, EVALUATED_SEQ = 200, 80  # windows: 16,000 characters tell accuracies apart to 0.4 points
MIXED = ("groups", "iid", "quantity")  # the partitions that need no classes


@dataclass(frozen=True, slots=True)
class _Options(Data):
    partition: str = "groups"
    epochs: int = 1
    steps: int = 0
    batch: int = 20
    lr: float = 8.0  # averaging damps it: in a fleet 8 learns faster than 4, and 2 is slow; alone all end alike
    momentum: float = 0.0
    proximal: float = 0.0
    clip: float = 1.0
    seq: int = 80
    speakers: int = 0
    characters: int = 500


DEFAULTS = _Options()


class NextCharacter(torch.nn.Module):
    """Characters in, [batch, seq], scores of each next one out, [batch, characters, seq]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(CHARACTERS), EMBEDDING)
        self.lstm = torch.nn.LSTM(EMBEDDING, HIDDEN, batch_first=True)
        self.scores = torch.nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Score the next character at every place."""
        hidden, _ = self.lstm(self.embedding(characters))
        scores: torch.Tensor = self.scores(hidden).transpose(1, 2)
        return scores


def build() -> torch.nn.Module:
    """Build a long short-term memory over characters with 84,177 parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return NextCharacter()


def train(model: torch.nn.Module, context: Context) -> TrainResult:
    """Train on this worker's speaker."""
    options = read(context.settings, DEFAULTS)
    windows = _windows_of(options.shares, options.partition, options.seq, options.speakers, options.characters)
    mine = windows[share_for(context.client, options)]
    return local_sgd(
        model, mine[:, :-1], mine[:, 1:], lr=options.lr, seed=context.seed, epochs=options.epochs, steps=options.steps,
        batch_size=options.batch, momentum=options.momentum, proximal=options.proximal, clip=options.clip,
        stopping=context.stopping,
    )  # fmt: skip


def evaluate(model: torch.nn.Module, context: Context) -> dict[str, float]:
    """Measure on windows held out, the same ones every time."""
    windows = _held_out()
    model.eval()
    with torch.no_grad():
        scores = model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(scores, windows[:, 1:])
    return {"accuracy": float((scores.argmax(1) == windows[:, 1:]).float().mean()), "loss": float(loss)}


def example_input() -> torch.Tensor:
    """Return what the model takes: any number of windows, as places in `CHARACTERS`."""
    return torch.zeros(2, EVALUATED_SEQ, dtype=torch.int64)


@lru_cache
def speakers() -> dict[str, npt.NDArray[np.int64]]:
    """Return what each says, as places in `CHARACTERS`, [characters]; those who say most come first.

    Raises:
        SettingsError: there is no such file, or it has other characters.
    """
    text = read_bytes("shakespeare", "shakespeare/input.txt").decode()
    unknown = set(text) - set(CHARACTERS)
    if unknown:
        raise SettingsError(f"shakespeare/input.txt has characters the model does not know: {sorted(unknown)!r:.80}")
    spoken: dict[str, list[str]] = defaultdict(list)
    for speech in text.split("\n\n"):
        name, _, words = speech.strip("\n").partition("\n")
        spoken[name.removesuffix(":")].append(words + "\n")
    place = np.zeros(128, np.int64)
    place[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    texts = {name: "".join(words) for name, words in spoken.items()}
    ordered = sorted(texts, key=lambda name: (-len(texts[name]), name))
    return {name: place[np.frombuffer(texts[name].encode(), np.uint8)] for name in ordered}


def cut(text: npt.NDArray[np.int64], seq: int) -> npt.NDArray[np.int64]:
    """Cut a text into windows of seq + 1 characters, each beginning with the last of the one before.

    Args:
        text: [characters].
        seq: characters predicted in a window, >= 1.

    Returns:
        [windows, seq + 1]; what is left at the end belongs to none.
    """
    count = max(0, (len(text) - 1) // seq)
    windows: npt.NDArray[np.int64] = text[np.arange(count)[:, None] * seq + np.arange(seq + 1)]
    return windows


def split(text: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return a speaker's text to train on and what is held out of it."""
    border = len(text) - round(HELD_OUT * len(text))
    return text[:border], text[border:]


@lru_cache
def _windows_of(shares: int, partition: str, seq: int, most: int, characters: int) -> list[torch.Tensor]:
    """Return each share's windows, int64 [windows, seq + 1]."""
    if partition.partition("(")[0] not in MIXED:
        raise SettingsError(
            f"task setting partition={partition}: text has no classes, must be one of {', '.join(MIXED)}"
        )
    texts = [split(text)[0] for text in speakers().values() if len(text) >= characters][: most or shares]
    if not texts:
        raise SettingsError(f"task setting characters={characters}: no speaker has {characters:,} characters")
    windows = [cut(text, seq) for text in texts]
    spoken = np.repeat(np.arange(len(windows)), [len(of_one) for of_one in windows])
    together = np.concatenate(windows)
    parts = dealt(np.zeros(len(together), np.int64), shares, partition, groups=spoken)
    return [torch.from_numpy(together[part]) for part in parts]


@lru_cache
def _held_out() -> torch.Tensor:
    """Return the windows evaluated on, of all speakers alike, int64 [EVALUATED, EVALUATED_SEQ + 1]."""
    windows = np.concatenate([cut(split(text)[1], EVALUATED_SEQ) for text in speakers().values()])
    chosen = np.random.default_rng(0).choice(len(windows), EVALUATED, replace=False)
    return torch.from_numpy(windows[np.sort(chosen)])
