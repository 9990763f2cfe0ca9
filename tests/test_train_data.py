"""The training script's data: downloaded, unpacked, damaged, absent; and what is made of an image."""

import hashlib
import http.server
import pickle
import re
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from training.augment import augment, cutout, for_test, random_crop, seeded
from training.data import Data, channel_moments, choose_data, load_data
from training_runs import CPU, MODELS, contents, main, one_line, train


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A CIFAR-10 of six images a file, in torchvision's eyes. Returns the archive; nothing is unpacked yet."""
    from torchvision.datasets import CIFAR10

    generator = torch.Generator().manual_seed(0)
    folder, sums = tmp_path / "source" / CIFAR10.base_folder, {}
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        images = torch.randint(256, (6, 3072), generator=generator, dtype=torch.uint8).numpy()
        entry = {"data": images, "labels": [0, 1, 2, 3, 4, 9], "label_names": list("abcdefghij")}
        (folder / name).write_bytes(pickle.dumps(entry))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tmp_path / "source" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in sums if name.startswith("data")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/nobody-listens-here")
    return archive


@pytest.fixture
def server(tmp_path, cifar10):
    """Returns a folder and the address that serves it."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(served))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_cifar10_is_downloaded_unpacked_and_read(cifar10, server, tmp_path, monkeypatch):
    served, url = server
    (served / cifar10.name).write_bytes(cifar10.read_bytes())
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{url}/{cifar10.name}")
    assert choose_data("auto", tmp_path / "data") == "cifar10"
    assert {path.name for path in (tmp_path / "data").iterdir()} == {cifar10.name, "cifar-10-batches-py"}
    data = load_data("cifar10", tmp_path / "data", None)
    assert data.train_images.shape == (30, 3, 32, 32)
    first = pickle.loads((tmp_path / "source" / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"][0]
    assert torch.equal(data.train_images[0].flatten(), torch.from_numpy(first))
    assert data.test_labels.tolist() == [0, 1, 2, 3, 4, 9]
    scaled = data.train_images.double() / 255
    torch.testing.assert_close(data.mean.double(), scaled.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(data.std.double(), scaled.std(dim=(0, 2, 3), correction=0), rtol=1e-6, atol=0)


def test_runs_that_unpack_one_archive_at_once_all_get_it(cifar10, tmp_path, monkeypatch):
    """Each unpacks for itself; the first to be ready puts it in place, and the others find it there."""
    from torchvision.datasets import utils

    extract, all_unpacked = utils.extract_archive, threading.Barrier(3)

    def extract_and_wait(*arguments):
        extract(*arguments)
        all_unpacked.wait(timeout=60)

    monkeypatch.setattr(utils, "extract_archive", extract_and_wait)
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / cifar10.name).write_bytes(cifar10.read_bytes())
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(choose_data, ["cifar10"] * 3, [data_dir] * 3)) == ["cifar10"] * 3
    assert {path.name for path in data_dir.iterdir()} == {cifar10.name, "cifar-10-batches-py"}
    assert len(load_data("cifar10", data_dir, None).train_images) == 30


@pytest.mark.parametrize("model", MODELS)
def test_training_on_cifar10(model, cifar10, tmp_path, capsys):
    options = ["--epochs", "1", "--batch-size", "10", "--out", str(tmp_path / "out"), "--data-dir", str(cifar10.parent)]
    assert main("--device", "cpu", *MODELS[model], *options) == 0
    assert "cifar10, 30 images for training, 6 for the test" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated archive", "truncated batch", "missing batch"])
def test_damaged_cifar10_is_one_line(damage, cifar10, tmp_path, capsys):
    data_dir = cifar10.parent
    batch = data_dir / "cifar-10-batches-py" / "data_batch_3"
    if damage == "truncated archive":
        batch.parent.rename(tmp_path / "away")
        cifar10.write_bytes(cifar10.read_bytes()[:100])
    elif damage == "truncated batch":
        batch.write_bytes(batch.read_bytes()[:100])
    else:
        batch.unlink()
    before = contents(tmp_path)
    assert main("--device", "cpu", "--data-dir", data_dir, "--out", tmp_path / "out") == 2
    error = one_line(capsys.readouterr().err)
    assert (cifar10.name if damage == "truncated archive" else batch.name) in error
    assert re.search("truncated or damaged|missing", error)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("network", ["refuses", "is silent", "lacks the file", "sends something else"])
def test_auto_trains_on_digits_where_cifar10_cannot_be_had(network, cifar10, server, tmp_path, monkeypatch, capsys):
    served, url = server
    data_dir = tmp_path / "data"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if network == "is silent":  # accepts the connection, never answers
            monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"http://127.0.0.1:{silent.getsockname()[1]}/")
            monkeypatch.setattr("training.data.CONNECT_SECONDS", 0.2)
        elif network != "refuses":
            monkeypatch.setattr("torchvision.datasets.CIFAR10.url", f"{url}/{cifar10.name}")
        if network == "sends something else":
            (served / cifar10.name).write_bytes(b"<html>log in first</html>")
        assert choose_data("auto", data_dir) == "digits"
        line = capsys.readouterr().out
        assert re.fullmatch(
            r"CIFAR-10 is not in \S+/ and cannot be downloaded \(.+\): training on scikit-learn's digits.*\n", line
        )
        with pytest.raises(train.Failure, match="cannot be downloaded"):
            choose_data("cifar10", data_dir)
    assert contents(tmp_path / "data") == {}


def test_digits_are_split_for_good_and_fill_the_grey_scale():
    data = load_data("digits", Path("unused"), None)
    assert data.train_images.shape == (1437, 3, 32, 32)
    assert data.test_images.shape == (360, 3, 32, 32)
    assert data.train_images.max() >= 250
    assert data.test_labels.bincount().min() >= 34  # stratified


@pytest.mark.parametrize("model", MODELS)
def test_augmentation_is_drawn_per_image_and_repeats(model):
    images = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).reshape(1, 3, 32, 32).expand(64, -1, -1, -1)
    data = Data("cifar10", images, None, images, None, *channel_moments(images))
    first, again = (augment(images, data, model, seeded(0, "augment", 5, CPU)) for _ in range(2))
    other = augment(images, data, model, seeded(0, "augment", 6, CPU))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) > 32
    assert first.shape == for_test(images, data, model).shape


def test_crop_and_cutout():
    images = torch.rand(50, 3, 12, 12)
    generator = torch.Generator().manual_seed(0)
    crops = random_crop(images, 8, generator)
    windows = images.unfold(2, 8, 1).unfold(3, 8, 1)  # (50, 3, 5, 5, 8, 8)
    found = (windows == crops[:, :, None, None]).all(dim=(1, 4, 5))
    assert (found.sum(dim=(1, 2)) == 1).all()
    assert (found.sum(dim=0) > 0).sum() > 15  # positions differ between images
    assert ((cutout(images + 1, 4, generator) == 0).sum(dim=(1, 2, 3)) == 3 * 4 * 4).all()
