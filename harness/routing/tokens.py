"""Token ids that a checkpoint's routing is recorded over: from ids, from a text, or from the text that Python ships."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.errors import bad, first_line
from harness.routing import checkpoint as checkpoints
from harness.routing.corpus import Corpus, python_corpus

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def tokens_of(
    checkpoint: Path, wanted: int, vocab: int, *, text: Path | None, ids: Path | None, corpus: Corpus | None
) -> tuple[torch.Tensor, str]:
    """int64 [wanted] and what they are. Errors: a file that cannot be read, ids outside of the vocabulary, too few."""
    if ids is not None:
        found, what = _ids(ids), f"token ids of {_told(ids)}"
        if len(found) and not 0 <= found.min() <= found.max() < vocab:
            wrong = found[(found < 0) | (found >= vocab)][0].item()
            raise bad("--token-ids", str(ids), f"holds {wrong}; the model's ids are 0 to {vocab - 1}")
    else:
        corpus = corpus or python_corpus()
        written = _text(text) if text is not None else corpus.held.tobytes().decode(errors="replace")
        where = _told(text) if text is not None else f"held-out part of: {corpus.description}"
        found, how = _read(checkpoint, written, vocab)
        what = f"{where}, {how}"
    if len(found) < wanted:
        source = ids or text or "the text that ships with Python"
        remedy = f"{source} holds only {len(found)} tokens; give fewer (--tokens, --passes) or a longer --text"
        raise bad("--tokens", wanted, remedy)
    return torch.from_numpy(found[:wanted].astype(np.int64)), what


def _read(checkpoint: Path, text: str, vocab: int) -> tuple[np.ndarray, str]:
    if any((checkpoint / name).is_file() for name in TOKENIZERS):
        library = checkpoints.transformers()
        try:
            tokenizer: Any = library.AutoTokenizer.from_pretrained(
                str(checkpoint), local_files_only=True, trust_remote_code=False
            )
            found = np.array(tokenizer(text)["input_ids"], np.int64)
        except Exception as error:  # tokenizers raise many kinds
            reason = first_line(error)
            remedy = f"its tokenizer cannot be used ({reason}); mend its files, or give --token-ids"
            raise bad("checkpoint", str(checkpoint), remedy) from None
        if len(found) and found.max() >= vocab:
            remedy = f"its tokenizer makes {found.max()}, but its vocabulary has {vocab} ids; download it again"
            raise bad("checkpoint", str(checkpoint), remedy)
        return found, "tokenised by the checkpoint's tokenizer"
    if vocab < 256:
        remedy = f"has no tokenizer, and its vocabulary of {vocab} holds no bytes; give --token-ids"
        raise bad("checkpoint", str(checkpoint), remedy)
    return np.frombuffer(text.encode(), np.uint8), "as bytes, because the checkpoint has no tokenizer"


def _ids(path: Path) -> np.ndarray:
    """Whole numbers of any shape, one after another."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = np.array(path.read_text().split(), np.int64)
    except OSError as error:
        raise bad("--token-ids", str(path), f"cannot be read ({error.strerror or error}); give another file") from None
    except (ValueError, EOFError, OverflowError) as error:
        remedy = f"holds no whole numbers ({first_line(error)}); give a .npy file, or a text of ids"
        raise bad("--token-ids", str(path), remedy) from None
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise bad("--token-ids", str(path), f"holds {getattr(found, 'dtype', 'an archive')}; token ids are integers")
    return found.ravel()


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise bad("--text", str(path), f"cannot be read ({error.strerror or error}); give another file") from None
    except UnicodeDecodeError as error:
        raise bad("--text", str(path), f"is no UTF-8 text (byte {error.start}); give text, or --token-ids") from None


def _told(path: Path) -> str:
    return f"{path.name}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
