"""A machine with Debian's own kernel, for what the kernel here lacks: QEMU, without acceleration.

It sees this machine's files as they are, may write to none of them, and is gone with its command.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manx" / "guest"
_META = "linux-image-amd64"  # depends on the newest of Debian's kernels
_BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
# Of 400 MB of modules, those that networks need.
_KEPT = ("arch", "crypto", "drivers", "drivers/net", "drivers/virtio", "fs", "lib", "net")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What the kernel starts first: this machine's files below, memory above them to write to.
_INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /dev /proc /below /above /root
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
for module in /modules/*; do $b insmod $module; done
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=1048576,cache=loose below /below
$b mount -t tmpfs none /above
$b mkdir /above/upper /above/work
$b mount -t overlay -o lowerdir=/below,upperdir=/above/upper,workdir=/above/work none /root
$b mount --move /dev /root/dev
$b mount --move /proc /root/proc
$b mount -t sysfs none /root/sys
for directory in run dev/shm; do
    $b mkdir -p /root/$directory
    $b mount -t tmpfs none /root/$directory
done
$b mkdir -p /root/run/out /root/lib/modules
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576 out /root/run/out
exec $b switch_root /root /bin/sh /run/out/script >/dev/console 2>&1
"""

_SCRIPT = """mount --bind {modules} /lib/modules
export PATH={path} LANG=C.UTF-8
cd {directory}
{command} </run/out/stdin >/run/out/stdout 2>/run/out/stderr
echo $? >/run/out/code
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


def build() -> Path:
    """The directory with ``vmlinuz``, ``initrd`` and ``modules``, made when there is none.

    Needs apt's lists and Debian's archive, once. Raises RuntimeError.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    made_of = repr((_INIT, _BOOT_MODULES, _KEPT))
    target = _CACHE / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            package = _package()
            print("unpacking Debian's kernel, once", file=sys.stderr, flush=True)
            half = target.with_suffix(".new")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            _unpack(package, half)
            half.rename(target)
    return target


def _package() -> str:
    depends = _output("apt-cache", "depends", "--important", _META)
    for line in depends.splitlines():
        if "Depends: linux-image-" in line:
            return line.split()[-1]
    raise RuntimeError(f"apt-cache knows no kernel that {_META} depends on: apt-get update first")


def _unpack(package: str, directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        _output("apt-get", "download", "-qq", package, cwd=scratch)
        (deb,) = Path(scratch).glob("*.deb")
        _output("dpkg", "-x", str(deb), scratch)
        (kernel,) = Path(scratch).glob("boot/vmlinuz-*")
        (modules,) = Path(scratch).glob("lib/modules/*")
        for kind in ("*", "drivers/*"):
            for found in modules.glob(f"kernel/{kind}"):
                if str(found.relative_to(modules / "kernel")) not in _KEPT:
                    shutil.rmtree(found)
        _output("depmod", "-b", scratch, modules.name)
        (directory / "initrd").write_bytes(_initrd(Path(scratch), modules.name))
        kernel.rename(directory / "vmlinuz")
        modules.parent.rename(directory / "modules")


def _initrd(base: Path, version: str) -> bytes:
    root = base / "initrd"
    for name in ("bin", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    for number, module in enumerate(dict.fromkeys(_needed(base, version))):
        shutil.copy(module, root / "modules" / f"{number:02}-{module.name}")
    files = "\n".join(str(path.relative_to(root)) for path in (root, *sorted(root.rglob("*"))))
    pack = ["busybox", "cpio", "-o", "-H", "newc"]
    return subprocess.run(
        pack, cwd=root, input=files.encode(), capture_output=True, check=True
    ).stdout


def _needed(base: Path, version: str) -> Iterator[Path]:
    """The modules without which there are no files yet, each after those that it needs."""
    for module in _BOOT_MODULES:
        asked = ("modprobe", "-S", version, "-d", str(base), "--show-depends", module)
        for line in _output(*asked).splitlines():
            kind, path, *_ = line.split()
            if kind == "insmod":
                yield Path(path)


def run_in_guest(
    command: Sequence[str], *, directory: Path, stdin: str = "", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """What became of a command that ran as root in the guest.

    Raises RuntimeError when the machine didn't get so far.
    """
    machine = build()
    with tempfile.TemporaryDirectory(prefix="manx-guest-") as scratch:
        out, console = Path(scratch) / "out", Path(scratch) / "console"
        out.mkdir()
        (out / "stdin").write_text(stdin)
        (out / "script").write_text(
            _SCRIPT.format(
                modules=shlex.quote(str(machine / "modules")),
                path=_PATH,
                directory=shlex.quote(str(directory)),
                command=shlex.join(command),
            )
        )
        try:
            subprocess.run(
                [
                    *_qemu(machine, console),
                    *_share("below", "/", readonly=True),
                    *_share("out", str(out)),
                ],
                stdin=subprocess.DEVNULL,
                timeout=timeout,
                check=True,
            )
            return subprocess.CompletedProcess(
                command,
                int((out / "code").read_text()),
                (out / "stdout").read_text(errors="replace"),
                (out / "stderr").read_text(errors="replace"),
            )
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            said = [
                path.read_text(errors="replace")[-4000:]
                for path in (console, out / "stderr")
                if path.exists()
            ]
            raise RuntimeError(f"the guest has not finished: {error}\n{''.join(said)}") from error


def _qemu(machine: Path, console: Path) -> list[str]:
    kernel = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on"
    return [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35"),
        *("-smp", "2", "-m", "1024", "-nodefaults", "-display", "none", "-no-reboot"),
        *("-kernel", str(machine / "vmlinuz"), "-initrd", str(machine / "initrd")),
        *("-append", kernel, "-serial", f"file:{console}"),
    ]


def _share(tag: str, path: str, *, readonly: bool = False) -> list[str]:
    """A directory as the guest's 9p file system ``tag``."""
    how = ",readonly=on,multidevs=remap" if readonly else ""
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none{how}"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


def _output(*command: str, cwd: str | None = None) -> str:
    """Raises RuntimeError with what the command complained about."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as problem:
        sys.exit(str(problem))
