"""What Prometheus and Grafana read is what the code says, and the alert rules do what they are for."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from metadist.runtime.metrics import METRICS

HERE = Path(__file__).parent

EXPORTED = {f"ray_{name}_total" if metric.kind == "counter" else f"ray_{name}" for name, metric in METRICS.items()}


def expressions(node: Any) -> list[str]:
    """Of rules or of a dashboard: what stands under `expr` and `query`."""
    if isinstance(node, dict):
        here = [value for key, value in node.items() if key in ("expr", "query") and isinstance(value, str)]
        return here + [found for value in node.values() for found in expressions(value)]
    return [found for value in node for found in expressions(value)] if isinstance(node, list) else []


def names(found: list[str]) -> set[str]:
    return {name for one in found for name in re.findall(r"[a-zA-Z_:]*metadist_\w+", one)}


def test_rules_and_dashboard_read_metrics_that_exist_and_all_of_them(infra: Path) -> None:
    rules = names(expressions(yaml.safe_load((infra / "prometheus" / "rules.yml").read_text())))
    dashboard = names(expressions(json.loads((infra / "grafana" / "dashboards" / "metadist.json").read_text())))
    assert rules
    assert dashboard
    assert rules - EXPORTED == set()
    assert dashboard - EXPORTED == set()
    assert EXPORTED - rules - dashboard == set(), "metrics that nobody looks at"


def test_tags_that_are_read_exist(infra: Path) -> None:
    texts = expressions(json.loads((infra / "grafana" / "dashboards" / "metadist.json").read_text()))
    texts += expressions(yaml.safe_load((infra / "prometheus" / "rules.yml").read_text()))
    tags = {"run", *(tag for metric in METRICS.values() for tag in metric.tags)}
    read = {tag for text in texts for group in re.findall(r"by \(([\w, ]+)\)", text) for tag in group.split(", ")}
    read |= {tag for text in texts for tag in re.findall(r"[{,](\w+)=", text)}
    assert read <= tags


def test_the_dashboard_is_provisioned(infra: Path) -> None:
    """It and its data source are where the other says, and no two panels lie on one another."""
    dashboard = json.loads((infra / "grafana" / "dashboards" / "metadist.json").read_text())
    source = yaml.safe_load((infra / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    (known,) = source["datasources"]
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"] == {"type": known["type"], "uid": known["uid"]}
        at = panel["gridPos"]
        taken = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert cells.isdisjoint(taken), panel["title"]
        assert all(x < 24 for x, _ in taken)
        cells |= taken
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert yaml.safe_load((infra / "grafana" / "provisioning" / "dashboards" / "metadist.yaml").read_text())[
        "providers"
    ]


def test_promtool_accepts_configuration_and_rules(infra: Path, promtool: Callable[..., str]) -> None:
    count = len(yaml.safe_load((infra / "prometheus" / "rules.yml").read_text())["groups"][0]["rules"])
    assert f"{count} rules found" in promtool("check", "rules", infra / "prometheus" / "rules.yml")
    assert "is valid" in promtool("check", "config", infra / "prometheus" / "prometheus.yml")


def test_every_alert_fires_when_it_should_and_only_then(
    infra: Path, promtool: Callable[..., str], tmp_path: Path
) -> None:
    text = (HERE / "rules_test.yaml").read_text()
    fires = {
        test["alertname"]
        for one in yaml.safe_load(text)["tests"]
        for test in one["alert_rule_test"]
        if test["exp_alerts"]
    }
    assert fires == set(re.findall(r"alert: (\w+)", (infra / "prometheus" / "rules.yml").read_text()))
    text = text.replace("RULES", str(infra / "prometheus" / "rules.yml")).replace(
        "NAN", str(HERE / "not_a_number.yaml")
    )
    (tmp_path / "rules_test.yaml").write_text(text)
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "rules_test.yaml")
