"""Whether a checkpoint's files are, byte for byte, those that its own list of SHA-256 names."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.file_digests import ListedFile, hash_file, read_manifest
from worker.load_progress import StartProgress
from worker.safetensors_files import INDEX_FILE, CheckpointError

MANIFEST = "SHA256SUMS"
SETTINGS = ("config.json", "generation_config.json", INDEX_FILE)
MAX_THREADS = 16  # hashing is not what bounds it any more


def verify_files(model_dir: Path, progress: StartProgress, *, is_required: bool) -> int:
    """Hashes every file that a worker reads, some at a time, and returns their number; 0 where there is no list.

    Raises CheckpointError where one is not as listed or not listed at all, or where the list is required and missing.
    """
    manifest = model_dir / MANIFEST
    if not manifest.is_file():
        if is_required:
            raise CheckpointError(f"{manifest} is missing and --verify-weights is require: make it with `ossia weights manifest`.")
        return 0
    listed = {one.name: one for one in read_manifest(manifest)}
    read = {file.name for file in model_dir.glob("*.safetensors")} | {name for name in SETTINGS if (model_dir / name).is_file()}
    if unlisted := sorted(read - listed.keys()):
        raise CheckpointError(f"{manifest} does not list {unlisted[0]}, which is read: make the list again.")
    sizes = {name: (model_dir / name).stat().st_size for name in read}
    progress.begin("verifying")
    num_done, num_all = 0, sum(sizes.values())
    largest_first = sorted(read, key=lambda name: sizes[name], reverse=True)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for one in threads.map(lambda name: _verify(model_dir, listed[name]), largest_first):
            num_done += sizes[one.name]
            progress.note_bytes(num_done, num_all)
    return len(read)


def _verify(model_dir: Path, listed: ListedFile) -> ListedFile:
    file = model_dir / listed.name
    if hash_file(file).hexdigest() != listed.sha256:
        raise CheckpointError(f"{file} is damaged: its SHA-256 is not the one in {MANIFEST}: download it again.")
    return listed
