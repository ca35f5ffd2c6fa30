"""A working folder for bad inputs: hostile files, a sound store, and damaged copies of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.store import Producer, open_store

#: Levels of nesting of what is nested too deeply.
DEEP = 5_000
_PAIRS = [
    {"prompt": f"question {n}", "chosen": f"a good reply {n}", "rejected": f"bad {n}"}
    for n in range(40)
]
_LINES = "".join(json.dumps(pair) + "\n" for pair in _PAIRS)
_ROW = json.dumps({"prompt": "p", "chosen": "c", "rejected": "%s"})

#: Presets that are no configuration, or a hostile one, by file name.
PRESETS: Mapping[str, bytes] = {
    "empty-list.yaml": b"[]",
    "list.yaml": b"[1, 2]",
    "number.yaml": b"17",
    "text.yaml": b"just words",
    "nul.yaml": b"name: a\0b\n",
    "latin1.yaml": "name: caf\u00e9\n".encode("latin-1"),
    "bytes.yaml": bytes(range(256)),
    "utf16.yaml": "name: tiny\nsed: 1\n".encode("utf-16"),
    "utf32.yaml": "name: tiny\nsed: 1\n".encode("utf-32"),
    "bom-wrong.yaml": b"\xef\xbb\xbfnam: tiny\n",
    "deep.yaml": b"[" * DEEP,
    "deep-map.yaml": b"{a: " * DEEP + b"}" * DEEP,
    "duplicate.yaml": b"seed: 1\nseed: 2\n",
    "duplicate-inner.yaml": b"ppo: {kl_coef: 0.1, kl_coef: 0.2}\n",
    "duplicate-alias.yaml": b"ppo: {gamma: 0.9, rl_gamma: 0.8}\n",
    "laughs.yaml": b"a0: &a0 lol\n"
    + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)
    ),
    "itself.yaml": b"ppo: &a {lora: *a}\n",
    "undefined.yaml": b"ppo: *nothing\n",
    "python.yaml": b"name: !!python/object/apply:os.system [ls]\n",
    "tag.yaml": b"seed: !mine 3\n",
    "tabs.yaml": b"ppo:\n\tkl_coef: 0.1\n",
    "two-documents.yaml": b"seed: 1\n---\nseed: 2\n",
    "markup.yaml": b"'[/x]': 1\n",
    "markup-value.yaml": b"name: '[/red]'\n",
    "escape.yaml": b'name: "\\e[31m\\r"\n',
    "direction.yaml": "name: a\u202eb\n".encode(),
    "lookalike.yaml": "ppo: {kl_\u0441oef: 0.1}\n".encode(),  # a Cyrillic letter
    "fullwidth.yaml": "seed: \uff11\uff12\n".encode(),
    "spaces.yaml": b"name: '   '\n",
    "infinite.yaml": b"ppo: {kl_coef: .inf}\n",
    "nan.yaml": b"ppo: {kl_coef: .nan}\n",
    "huge-int.yaml": b"ppo: {total_episodes: " + b"9" * 400 + b"}\n",
    "very-long-int.yaml": b"seed: " + b"9" * 10_000 + b"\n",
    "sexagesimal.yaml": b"seed: 1:30\n",
    "octal.yaml": b"ppo: {total_episodes: 0o}\n",
    "date.yaml": b"name: 2026-01-01\n",
    "bad-date.yaml": b"name: 2026-13-45\n",
    "flag-as-name.yaml": b"name: yes\n",
    "null-key.yaml": b"null: 1\n",
    "number-key.yaml": b"17: 1\n",
    "list-key.yaml": b"? [1, 2]\n: 1\n",
    "null-section.yaml": b"ppo:\n",
    "merge.yaml": b"<<: {seed: 1, nonsense: 2}\n",
    "long-key.yaml": b"x" * 5_000 + b": 1\n",
    "long-value.yaml": b"name: " + b"x" * 100_000 + b"\n",
    "too-big.yaml": b"# " + b"x" * 3_000_000 + b"\n",
    "html.yaml": b"<!DOCTYPE html><html><body>404</body></html>\n",
    "json-cut.yaml": b'{"ppo": {"kl_coef": 0.1',
    "windows.yaml": b"name: tiny\r\nsed: 1\r\n",
    "control.yaml": b"name: a\x07b\n",
    "surrogate.yaml": b'name: "\\ud800"\n',
}
#: The one of them that is a configuration all the same: an empty section has its defaults.
SOUND = ("null-section.yaml", "sexagesimal.yaml")

#: Data that no preferences can be read from, by file name.
DATA: Mapping[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "cut.jsonl": b'{"prompt": "a", "chosen": "b", "rej',
    "null.jsonl": b"null\n" * 20,
    "numbers.jsonl": b"1\n2\n3\n" * 20,
    "deep.jsonl": (b"[" * DEEP + b"]" * DEEP + b"\n") * 3,
    "deep-object.json": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "nul.jsonl": _LINES.encode().replace(b"good", b"go\0od")[:40],
    "bytes.jsonl": bytes(range(256)) * 40,
    "utf16-odd.jsonl": _LINES.encode("utf-16")[:-1],
    "long-number.jsonl": b'{"prompt": ' + b"9" * 20_000 + b"}\n",
    "repeated-key.jsonl": b'{"prompt": "a", "prompt": "b"}\n' * 30,
    "nan.jsonl": b'{"prompt": NaN, "chosen": Infinity, "rejected": -Infinity}\n' * 30,
    "same.jsonl": (_ROW % "c" + "\n").encode() * 40,
    "no-columns.csv": b"\n\n\n",
    "one-column.csv": b"a\n1\n2\n",
    "quotes.csv": b'prompt,chosen,rejected\n"a,b,c\n' * 20,
    "wide.csv": b",".join(b"c%d" % n for n in range(20_000)) + b"\n",
    "twice.csv": b"prompt,prompt,chosen,rejected\na,b,c,d\n",
    "html.jsonl": b"<html>404</html>\n" * 20,
    "lfs.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "magic.parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
    "magic.arrow": b"ARROW1" + b"\xff" * 100,
    "no.gz": b"\x1f\x8b\x08\0" + b"\xff" * 50,
    "cut.jsonl.gz": gzip.compress(_LINES.encode())[:-30],
    "twice.jsonl.gz": gzip.compress(gzip.compress(_LINES.encode())),
    "zip.jsonl": b"PK\x03\x04" + b"\0" * 200,
    "pickle.jsonl": b"\x80\x04\x95" + b"\0" * 200,
    "sqlite.jsonl": b"SQLite format 3\0" + b"\0" * 200,
    "surrogates.jsonl": (_ROW % "\\ud800" + "\n").encode() * 40,
    "controls.jsonl": (_ROW % "\\u0000\\u001b[31m\\u202e" + "\n").encode() * 40,
}
#: Bytes that a bomb unpacks to: a kilobyte of them is a megabyte.
BOMB = 400 * 2**20


def make_folder(folder: Path) -> None:
    """Fill a new folder with hostile files, and with stores."""
    (folder / "folder").mkdir()
    (folder / "folder" / "x").write_text("1")
    (folder / "empty").mkdir()
    for name in ("pipe", "pipe.yaml", "pipe.jsonl"):
        os.mkfifo(folder / name)
    (folder / "zero.yaml").symlink_to("/dev/zero")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "dangling.yaml").symlink_to("nowhere")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "folder.yaml").mkdir()
    for name, data in {**PRESETS, **DATA}.items():
        (folder / name).write_bytes(data)
    (folder / "plain.yaml").write_text("evaluation: {judge: none}\nstore: stores/sound\n")
    (folder / "pairs.jsonl").write_text(_LINES)
    (folder / "prompts.txt").write_text("What is tea?\nWhat is a cup?\n")
    _bomb(folder / "bomb.jsonl.gz", b"{" + b" " * (2**20 - 2) + b"\n")
    _bomb(folder / "bomb-line.jsonl.gz", b"a" * 2**20)
    _bomb(folder / "bomb.csv.gz", b"\0" * 2**20)
    (folder / "stores").mkdir()
    sound = folder / "stores" / "sound"
    digests = make_store(folder, sound)
    for name, damage in DAMAGES.items():
        copy = shutil.copytree(sound, folder / "stores" / name)
        damage(copy, digests["policy"])
    (folder / "digests.json").write_text(json.dumps(digests))


def make_store(folder: Path, place: Path) -> dict[str, str]:
    """Make a store with a dataset, a policy from it that is champion and pinned, and a verdict."""
    store = open_store(str(place), cache_dir=folder / "cache-of-maker")
    producer = Producer(stage="s", code_version="1", config={}, seed=0, versions={})
    refs = {}
    for kind, parents in (("dataset", {}), ("policy", {"data": "dataset"}),
                          ("verdict", {"policy": "policy"}), ("evaluation", {})):  # fmt: skip
        source = folder / f"{kind}-files"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"kind": kind}))
        refs[kind] = store.publish(
            source, kind, parents={role: refs[name] for role, name in parents.items()},
            producer=producer, metrics={},
        )  # fmt: skip
        shutil.rmtree(source)
    store.pins.add("kept", refs["policy"])
    entry = {
        "model": "default", "policy": refs["policy"].digest, "verdict": refs["verdict"].digest,
        "why": "first", "by": "ann", "when": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    store.history.append("champion/default", entry)
    shutil.rmtree(folder / "cache-of-maker", ignore_errors=True)
    return {kind: ref.digest for kind, ref in refs.items()}


def _bomb(path: Path, piece: bytes) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(BOMB // len(piece)):
            file.write(piece)


Damage = Callable[[Path, str], object]


def _manifest(data: bytes) -> Damage:
    return lambda store, digest: (store / "manifests" / f"{digest}.json").write_bytes(data)


def _each(pattern: str, data: bytes) -> Damage:
    def write(store: Path, _: str) -> None:
        paths = [path for path in store.glob(pattern) if path.is_file()]
        assert paths, pattern
        for path in paths:
            path.write_bytes(data)

    return write


def _as_folder(pattern: str) -> Damage:
    def replace(store: Path, _: str) -> None:
        for path in [*store.glob(pattern)]:
            path.unlink()
            path.mkdir()
            (path / "x").write_text("1")

    return replace


def _removed(pattern: str) -> Damage:
    return lambda store, _: [path.unlink() for path in store.glob(pattern)]


def _linked(pattern: str, target: str) -> Damage:
    def link(store: Path, _: str) -> None:
        for path in [*store.glob(pattern)]:
            path.unlink()
            path.symlink_to(target)

    return link


_JUNK: Mapping[str, bytes] = {
    "empty": b"", "null": b"null", "list": b"[]", "object": b"{}", "cut": b'{"format": 1, "ki',
    "nul": b"\0" * 64, "bytes": bytes(range(256)), "deep": b"[" * DEEP, "number": b"9" * 10_000,
    "nan": b'{"format": NaN}', "markup": b'{"[/x]": "\\u001b[31m\\r"}', "html": b"<html>404</html>",
    "large": b'{"a": "' + b"x" * 6_000_000 + b'"}',
}  # fmt: skip
#: What may happen to a store, by name.
DAMAGES: Mapping[str, Damage] = {
    **{f"manifest-{name}": _manifest(data) for name, data in _JUNK.items()},
    **{
        f"champion-{name}": _each("refs/champion/default/*.json", data)
        for name, data in _JUNK.items()
    },
    **{f"pin-{name}": _each("pins/*.json", data) for name, data in _JUNK.items()},
    **{f"blob-{name}": _each("blobs/sha256/*/*", data) for name, data in _JUNK.items() if name in (
        "empty", "bytes")},
    "blob-gone": _removed("blobs/sha256/*/*"),
    "blob-folder": _as_folder("blobs/sha256/*/*"),
    "blob-endless": _linked("blobs/sha256/*/*", "/dev/zero"),
    "manifest-gone": _removed("manifests/*.json"),
    "manifest-folder": _as_folder("manifests/*.json"),
    "manifest-loop": _linked("manifests/*.json", "loop"),
    "champion-folder": _as_folder("refs/champion/default/*.json"),
    "pin-folder": _as_folder("pins/*.json"),
    "stray": lambda store, _: (store / "manifests" / "[\x1b[31m.json").write_text("x"),
}  # fmt: skip
