"""Encrypted images beside the real programs: what one writes the other reads, and passphrases come and go on both sides."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from qblock.tools import io as io_tool
from qblock.tools.img import main

Run = Callable[..., tuple[int, str]]

SECRETS = ("--object", "secret,id=s,data=first", "--object", "secret,id=t,data=second", "--object", "secret,id=x,data=wrong")
METHODS = (
    "encrypt.format=luks",
    "encrypt.format=luks,encrypt.cipher-alg=aes-128",
    "encrypt.format=luks,encrypt.cipher-alg=aes-192,encrypt.hash-alg=sha512",
    "encrypt.format=luks,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.hash-alg=sha1",
    "encrypt.format=luks,encrypt.cipher-mode=cbc,encrypt.cipher-alg=aes-128,encrypt.ivgen-alg=plain",
    "encrypt.format=luks,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    "encrypt.format=aes",
)


def real(*args: str | Path) -> tuple[int, str]:
    """Exit code and output of a real program, which is run again when it could not measure its own speed."""
    for _ in range(30):
        done = subprocess.run(args, capture_output=True, text=True, check=False)
        if "accurate CPU usage" not in done.stderr:
            break
    return done.returncode, done.stdout + done.stderr


def fine(*args: str | Path) -> str:
    """Output of a real program that must succeed."""
    code, out = real(*args)
    assert code == 0 and "failed" not in out, (args, out)
    return out


def unlocked(image: str, secret: str = "s") -> tuple[str, ...]:
    return (*SECRETS, "--image-opts", f"driver=qcow2,file.driver=file,file.filename={image},encrypt.key-secret={secret}")


def io_words(commands: list[str]) -> list[str]:
    return [word for command in commands for word in ("-c", command)]


@pytest.fixture
def img(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs qblock-img in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str]:
        capfd.readouterr()
        code = main(list(args))
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def quick(method: str, time: int = 0) -> str:
    """The method, with as little time for passphrases as there can be; the real program takes its time all the same."""
    return f"{method},encrypt.iter-time={time}" if "luks" in method else method


@pytest.mark.parametrize("seed", range(14))
def test_each_reads_what_the_other_has_written(seed: int, img: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """In turns, at random geometries, over a plain backing file or none, with internal snapshots and changes of size."""
    random = Random(seed)
    method = METHODS[seed % len(METHODS)]
    size = random.choice([1 << 20, 3 << 20, 5 << 18])
    model = bytearray(size)
    backing: list[str] = []
    if random.random() < 0.5:
        fine("qemu-img", "create", "-q", "-f", "qcow2", "base", str(size // 2))
        fine("qemu-io", "-f", "qcow2", "-c", f"write -P 77 0 {size // 2}", "base")
        model[: size // 2] = b"M" * (size // 2)
        backing = ["-b", "base", "-F", "qcow2"]
    cluster = 1 << random.choice([9, 12, 16, 21])
    options = f"encrypt.key-secret=s,cluster_size={cluster},compat={random.choice(['1.1', '0.10'])}"
    words = ["create", "-q", *SECRETS, "-f", "qcow2", *backing, "-o"]
    if seed < len(METHODS):
        fine("qemu-img", *words, f"{options},{quick(method, 1)}", "image", str(size))
    else:
        assert img(*words, f"{options},{quick(method)}", "image", str(size)) == (0, "")
    for turn in range(3):
        commands = _writes(random, model)
        if turn % 2:
            fine("qemu-io", *io_words(commands), *unlocked("image"))
        else:
            assert io_tool.main([*io_words(commands), *unlocked("image")]) == 0
            assert "failed" not in capfd.readouterr().out
        if random.random() < 0.5:
            fine("qemu-img", "snapshot", "-c", f"snap{turn}", *unlocked("image"))
        elif not backing and "snapshot" not in fine("qemu-img", "snapshot", "-l", *unlocked("image")).lower():
            model.extend(bytes(65536))
            assert img("resize", "-q", *unlocked("image"), str(len(model))) == (0, "")
        _both_read(img, model)
    ours, theirs = img("info", "image")[1], fine("qemu-img", "info", "image")
    assert ours == theirs
    assert json.loads(img("info", "--output=json", "image")[1]) == json.loads(fine("qemu-img", "info", "--output=json", "image"))


def _writes(random: Random, model: bytearray) -> list[str]:
    commands = []
    for _ in range(8):
        at = random.randrange(len(model))
        length = min(random.choice([1, 512, 5000, 70000, 300000]), len(model) - at)
        pattern = random.randrange(256)
        if random.random() < 0.2:
            commands.append(f"write -q -z {at} {length}")
            pattern = 0
        else:
            commands.append(f"write -q -P {pattern} {at} {length}")
        model[at : at + length] = bytes([pattern]) * length
    return commands


def _both_read(img: Run, model: bytearray) -> None:
    for name, run in (("ours", img), ("real", lambda *args: real("qemu-img", *args))):
        code, out = run("convert", *unlocked("image"), "-O", "raw", name)
        assert code == 0, out
        assert Path(name).read_bytes() == model, name
    assert "No errors were found" in fine("qemu-img", "check", *unlocked("image"))
    code, out = img("check", *unlocked("image"))
    assert code == 0 and "No errors were found" in out, out


@pytest.mark.timeout(400)  # the real one measures its speed anew for each change, for seconds
@pytest.mark.parametrize("seed", range(2))
def test_passphrases_come_and_go_alike(seed: int, img: Run) -> None:
    """The same changes on an image of each side's: the same are refused, the same slots are active, the same keys open."""
    random = Random(seed)
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time="
    fine("qemu-img", "create", "-q", *SECRETS, "-f", "qcow2", "-o", options + "1", "theirs", "1M")
    assert img("create", "-q", *SECRETS, "-f", "qcow2", "-o", options + "0", "mine", "1M")[0] == 0
    key = "s"
    for _ in range(8):
        change = _change(random)
        force = ["--force"] if random.random() < 0.15 and "inactive" not in change else []
        ours = img("amend", *force, "-o", change, *unlocked("mine", key))
        theirs = real("qemu-img", "amend", *force, "-o", change, *unlocked("theirs", key))
        assert bool(ours[0]) == bool(theirs[0]), (change, force, ours, theirs)
        assert _active("mine") == _active("theirs"), change
        usable = [name for name in "st" if _opens("theirs", name)]
        assert usable == [name for name in "st" if _opens("mine", name)]
        assert usable == [name for name in "st" if io_tool.main([*READ, *unlocked("theirs", name)]) == 0]
        key = random.choice(usable)


READ = ["-r", "-c", "read -q 0 512"]


def _opens(image: str, secret: str) -> bool:
    return real("qemu-io", *READ, *unlocked(image, secret))[0] == 0


def _change(random: Random) -> str:
    words = []
    state = random.choice(["active", "active", "inactive"])
    if state == "active" or random.random() < 0.1:
        words.append(f"encrypt.new-secret={random.choice('st')}")
    if state == "active":
        words.append("encrypt.iter-time=0")
    if state == "inactive" and random.random() < 0.5:
        words.append(f"encrypt.old-secret={random.choice('sstx')}")
    if random.random() < (0.3 if state == "active" else 0.6):
        words.append(f"encrypt.keyslot={random.choice([0, 1, 1, 2, 2, 3, 8])}")
    return ",".join([f"encrypt.state={state}", *words])


def _active(image: str) -> list[bool]:
    info = json.loads(fine("qemu-img", "info", "--output=json", image))
    return [slot["active"] for slot in info["format-specific"]["data"]["encrypt"]["slots"]]


def test_without_a_key_the_same_commands_are_refused(img: Run) -> None:
    """info needs none; everything that opens the image for its content or to check it does, and a wrong one does not help."""
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0"
    assert img("create", "-q", *SECRETS, "-f", "qcow2", "-o", options, "image", "1M") == (0, "")
    for words in (
        ["check"], ["map"], ["snapshot", "-l"], ["measure", "-O", "qcow2"], ["convert", "-O", "raw"], ["info"],
        ["info", "--backing-chain"],
    ):  # fmt: skip
        target = ["out"] if words[0] == "convert" else []
        assert img(*words, "image", *target)[0] == real("qemu-img", *words, "image", *target)[0], words
        if words[0] not in ("info", "convert"):
            assert img(*words, *unlocked("image", "x"))[0] == real("qemu-img", *words, *unlocked("image", "x"))[0] == 1
            ours, theirs = img(*words, *unlocked("image")), real("qemu-img", *words, *unlocked("image"))
            assert ours == theirs, words


@pytest.mark.parametrize(
    ("cluster", "method"), [("512", METHODS[0]), ("64k", METHODS[1]), ("2M", METHODS[2]), ("64k", METHODS[6])]
)
def test_measure_counts_the_header(cluster: str, method: str, img: Run) -> None:
    """As many clusters as the real one, for each length of key."""
    options = f"encrypt.key-secret=s,cluster_size={cluster},{quick(method)}"
    words = ["measure", *SECRETS, "-O", "qcow2", "--size", "10M", "-o", options]
    assert img(*words) == real("qemu-img", *words)


def test_converted_images_are_encrypted(img: Run) -> None:
    """-o with convert: the target is made and unlocked with the same key; compressing it as well is refused."""
    Path("raw").write_bytes(bytes(range(256)) * 4096)
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time="
    assert img("convert", *SECRETS, "-O", "qcow2", "-o", options + "0", "raw", "mine") == (0, "")
    fine("qemu-img", "convert", *SECRETS, "-O", "qcow2", "-o", options + "1", "raw", "theirs")
    for image in ("mine", "theirs"):
        assert img("convert", *unlocked(image), "-O", "raw", "back") == (0, "")
        assert Path("back").read_bytes() == Path("raw").read_bytes()
        fine("qemu-img", "convert", *unlocked(image), "-O", "raw", "back")
        assert Path("back").read_bytes() == Path("raw").read_bytes()
        assert bytes(range(256)) not in Path(image).read_bytes()
    code, out = img("convert", "-c", *SECRETS, "-O", "qcow2", "-o", options + "0", "raw", "both")
    assert code == 1 and re.search("compress", out) and not Path("both").exists()


def test_the_formatting_line_is_the_real_one(img: Run) -> None:
    """Options of encryption come first; it is printed before the key is looked for."""
    for method in (*METHODS, "encryption=on"):
        words = ["create", "-f", "qcow2", "-o", f"encrypt.key-secret=nobody,{quick(method, 5)}", "image", "1M"]
        ours, theirs = img(*words), real("qemu-img", *words)
        assert ours[0] == theirs[0] == 1 and ours[1].splitlines()[0] == theirs[1].splitlines()[0]
        assert "nobody" in ours[1]


def test_options_that_contradict_each_other_are_refused_alike(img: Run) -> None:
    """Before anything is made."""
    for options in (
        "encryption=on,encrypt.format=luks,encrypt.key-secret=s",
        "encrypt.format=luks",
        "encrypt.format=luks,encrypt.key-secret=nobody",
        "encrypt.format=des,encrypt.key-secret=s",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=rot13",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=crc32",
        "encrypt.key-secret=s",
        "encryption=off,encrypt.key-secret=s",
    ):
        words = ["create", "-q", *SECRETS, "-f", "qcow2", "-o", options, "image", "1M"]
        assert img(*words)[0] == real("qemu-img", *words)[0] == 1, options
        Path("image").unlink(missing_ok=True)
