"""Examples for the help of `tdlrt` and of its commands."""

__all__ = ["EXAMPLES", "examples_of"]

EXAMPLES = """\
[bold]Examples[/bold]

  tdlrt demo

  tdlrt train lenet5 --data digits --baseline

  tdlrt train lenet5 --data mnist --data-dir DIR --tau 0.15 --seed 1

  tdlrt train vgg16 --data cifar10 --weight-decay 5e-4 --out runs/vgg

  tdlrt train vgg16 --data cifar10 --weight-decay 5e-4 --out runs/vgg --resume

  tdlrt train vgg16 --data cifar10 --checkpoint-minutes 10 --keep 3

  tdlrt compare lenet5 --data digits --methods dense,tdlrt --budget 0.1,0.2 --out runs/sweep

  tdlrt report runs/sweep

  tdlrt plan vgg16 --data cifar10 --rank 0.2

  tdlrt bench vgg16 --data cifar10 --rank 0.2 --batch-size 64

  tdlrt export runs/vgg --format onnx --int8

  tdlrt doctor
"""


def examples_of(command: str) -> str:
    """The examples of one command."""
    title, *lines = EXAMPLES.split("\n\n")
    return "\n\n".join([title, *(line for line in lines if f"tdlrt {command}" in line)])
