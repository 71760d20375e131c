"""Train two subjects of the embedded toybox one after the other, stop and resume the second, and sample from both."""

from pathlib import Path

from diffusekrona_train import Progress, Stopped, sample, train


def config(output: Path, noun: str, steps: int) -> dict:
    subject = {"images": f"toybox:{output.name}", "class": noun}
    tree = {"model": "toybox", "subject": subject, "train": {"steps": steps}, "validation": {"every": 0}}
    return tree | {"output": str(output)}


def two_subjects(poodle: Path, teapot: Path, steps: int = 300) -> list[Path]:
    train(config(poodle, "dog", steps))
    progress = Progress(lambda event, fields: event == "step" and fields["step"] == 5 and progress.stop())
    try:
        train(config(teapot, "teapot", steps), progress=progress)
    except Stopped:
        train(config(teapot, "teapot", steps), resume=True)
    return [one.file for run in (poodle, teapot) for one in sample(run, "A [V] {class}", output=run / "images")]


if __name__ == "__main__":
    print(*two_subjects(Path("runs/poodle"), Path("runs/teapot")), sep="\n")
