"""What a run does to its store, nothing, and what it says when the store goes while it trains."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from pretrain.data.loader import Loader
from pretrain.data.local_cache import LocalCache
from pretrain.data.store import Store
from tests.training.runs import metrics, recipe, train, write_corpus

MLM = {"objectives": {"mlm": {}}, "sampler": {}}


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", shard_megabytes=0.001)


def listing(folder):
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def after_steps(monkeypatch, steps, act):
    """Call ``act`` once, before the batch that follows ``steps`` of them."""
    following, made = Loader.next, []

    def next_batch(self):
        if self.batch_rows == 8:
            made.append(self)
            if len(made) == steps + 1:
                act()
        return following(self)

    monkeypatch.setattr(Loader, "next", next_batch)


@pytest.mark.parametrize("file", ["tokens", "index.npy"])
def test_a_store_cut_short_while_training_ends_the_run_with_one_line(corpus, tmp_path, monkeypatch, file):
    store = Store(corpus / "train")
    names = [shard["file"] for shard in store.meta["shards"]] if file == "tokens" else [file]

    def cut():
        for name in names:
            os.truncate(store.folder / name, 16)

    after_steps(monkeypatch, 4, cut)
    document = recipe(corpus, tmp_path / "run", data__packing_window=16, heldout={"rows": 0}, **MLM)
    code, _, err = train(document)
    line = err.strip().splitlines()[-1]
    assert code == 1 and line.startswith(f"train: failed: {store.folder}/{names[0][:6]}"), err
    assert line.endswith("cannot be read any more: it has been cut to 16 bytes") and "Traceback" not in err
    assert 3 <= len(metrics(tmp_path / "run")) <= 5


def test_a_run_that_reads_copies_does_what_one_without_them_does(corpus, tmp_path, monkeypatch):
    start = LocalCache.start
    monkeypatch.setattr(LocalCache, "start", lambda self: (start(self), self.join()))
    runs = {name: recipe(corpus, tmp_path / name, **MLM) for name in ("plain", "cached")}
    assert train(runs["plain"])[0] == 0
    runs["cached"]["data"]["cache"] = {"folder": str(tmp_path / "cache"), "gigabytes": 1}
    code, _, err = train(runs["cached"])
    assert code == 0 and "data.cache" not in err, err
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert len(list((tmp_path / "cache").glob("*.bin"))) == 1 + len(Store(corpus / "train").meta["shards"]) > 3


READ_ONLY = """
import sys
from tests.training.runs import train
import yaml
code, _, err = train(yaml.safe_load(open(sys.argv[1])))
print(err, file=sys.stderr)
sys.exit(code)
"""


def can_mount_read_only():
    probe = ["unshare", "-m", "sh", "-c", "mount --bind /tmp /tmp && mount -o remount,bind,ro /tmp"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def test_training_reads_a_read_only_file_system_and_writes_nothing_beside_the_store(corpus, tmp_path):
    if not can_mount_read_only():
        pytest.skip("mounting needs privileges that this process does not have")
    document, before = recipe(corpus, tmp_path / "run", **MLM), listing(corpus)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! touch "$1/probe" 2>/dev/null || exit 3; '
    command = ["unshare", "-m", "sh", "-c", mount + 'exec "$2" -c "$3" "$4"', "sh"]
    arguments = [corpus, sys.executable, READ_ONLY, tmp_path / "recipe.yaml"]
    ranks = ("MASTER_", "RANK", "LOCAL_", "WORLD_")  # of runs in this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 6 and listing(corpus) == before
