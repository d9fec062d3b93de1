"""Processes that may end while they are looked at."""

from __future__ import annotations

import psutil


def ended(process: psutil.Process) -> bool:
    """Gone, or dead and not yet fetched by its parent."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return True


def gone(pid: int) -> bool:
    """As `ended`, of whom only the id is known."""
    try:
        return ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def stopped(process: psutil.Process) -> bool:
    """Standing still after SIGSTOP."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def below(process: psutil.Process, name: str) -> list[psutil.Process]:
    """The descendants that have `name` in their command line, such as vLLM's engines (`EngineCore`)."""
    return [one for one in process.children(recursive=True) if name in _command(one)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie too
        return ""
