"""A comparison as Markdown, for a README or a terminal."""

from typing import Any

from loadtest.report.tables import NOISE, Report, Table, costs, four_bits, generator, memory, speed

GENERATOR = (
    "The same loads on a server that computes nothing, on the same machine. Where a mode comes near this throughput, "
    "it is Locust that was measured: give it more `--processes`."
)

FOUR_BITS = (
    "The same loads on the base in 16 and in 4 bits: faster or slower by tokens a second and median time per token; "
    f"differences up to {NOISE * 100:g} % count as none."
)


def markdown_report(report: Report) -> str:
    blocks = [f"# {title_of(report)}", paragraph_of(report), "## Speed", _table(speed(report))]
    found = costs(report)
    if found.rows:
        blocks += ["## What each way costs", "Against the same load on what it is compared with.", _table(found)]
    if (narrow := four_bits(report)).rows:
        blocks += ["## Is 4-bit slower?", FOUR_BITS, _table(narrow)]
    blocks += ["## Memory", _table(memory(report))]
    if report["echo"]:
        blocks += ["## The load generator itself", GENERATOR, _table(generator(report))]
    if report["left_out"]:
        blocks += ["## Left out", "\n".join(f"- {mode['title']}: {mode['why']}" for mode in report["left_out"])]
    commands = "\n".join([report["command"], *(mode["command"] for mode in report["modes"])])
    blocks += ["## To repeat it", f"```sh\n{commands}\n```", environment_of(report)]
    return "\n\n".join(blocks) + "\n"


def title_of(report: Report) -> str:
    return f"Ways to serve adapters of {report['base']}"


def paragraph_of(report: Report) -> str:
    scenario = report["scenario"]
    adapters = scenario["adapters"]
    return (
        f"Scenario `{scenario['name']}`: prompts {lengths(scenario['prompt'])}, "
        f"answers {lengths(scenario['output'])}, "
        f"{adapters['count']} adapters of rank {adapters['rank']} ({adapters['popularity']}), "
        f"{scenario['seconds']} s a load of which the first {scenario['warmup']:g} are not counted. "
        "Closed users: each waits for its answer before it asks again."
    )


def lengths(found: dict[str, Any]) -> str:
    match found["distribution"]:
        case "fixed":
            return f"of {found['tokens']} tokens"
        case "uniform":
            return f"of {found['low']} to {found['high']} tokens"
        case _:
            return f"of about {found['median']} tokens (lognormal, at most {found['most']})"


def environment_of(report: Report) -> str:
    surroundings = [f"{key} {value}" for key, value in report["environment"].items() if value not in ("", None)]
    commits: dict[str, list[str]] = {}
    for mode in report["modes"]:
        commits.setdefault(mode.get("commit", ""), []).append(mode["name"])
    if len(commits) > 1:
        surroundings = [text for text in surroundings if not text.startswith("commit ")]
        surroundings += [f"{', '.join(names)} at commit {commit}" for commit, names in commits.items()]
    devices = {f"{mode.get('device')} in {mode.get('dtype')}, " for mode in report["modes"]}
    return f"On {''.join(sorted(devices))}{', '.join(surroundings)}."


def _table(table: Table) -> str:
    rule = ("---", *("---:" for _ in table.head[1:]))
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.head, rule, *table.rows))
