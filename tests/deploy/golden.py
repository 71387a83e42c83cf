"""Records how the examples render: `python -m tests.deploy.golden` writes tests/deploy/golden anew."""

from pathlib import Path

from tests.deploy.chart import EXAMPLES, Values, example, render_text

GOLDEN = Path(__file__).parent / "golden"
GENERATED = "generated.yaml"  # dashboards and alerts, which another test keeps current


def golden_text(values: Values) -> str:
    """All that Helm renders, templates by name."""
    return "".join(f"# {name}\n{text.strip()}\n" for name, text in render_text(values).items() if text.strip() and name != GENERATED)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in ("default", *EXAMPLES):
        (GOLDEN / f"{name}.yaml").write_text(golden_text(example(name)))


if __name__ == "__main__":
    main()
