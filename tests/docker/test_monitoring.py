"""The dashboard, the alerts and the provisioning agree with each other and with a real scrape."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.scrape import label_names, metric_names, real_scrape, sample_names

DOCKER = Path(__file__).resolve().parents[2] / "docker"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana/dashboards/overview.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SCRAPE_LABELS = {"job", "instance"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        yield f"variable {variable['name']}", variable["definition"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def scrape() -> str:
    return real_scrape()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_that_is_queried_exists_in_a_scrape(where: str, expression: str, scrape: str) -> None:
    names = metric_names(expression)
    assert names or expression.startswith("up"), f"no metric found in {expression}"
    missing = names - sample_names(scrape)
    assert not missing, f"{where}: {missing}"


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_label_that_is_selected_exists_on_the_metric(where: str, expression: str, scrape: str) -> None:
    for label in label_names(expression) - SCRAPE_LABELS:
        for name in metric_names(expression):
            selected = re.search(re.escape(name) + r"\{[^}]*\b" + label + r"\s*[=!]", expression)
            if selected:
                assert re.search(re.escape(name) + r"\{[^}]*\b" + label + '="', scrape), (
                    f"{where}: {name} has no {label}"
                )


def test_the_name_finder_sees_names_and_only_names() -> None:
    expression = (
        'histogram_quantile(0.99, sum by (le) (rate(vllm:x_seconds_bucket{a=~"b_c", d="e"}[$__rate_interval]))) '
        "/ clamp_min(sum(rate(braid_steps_total[5m] offset 1h)), 1e-9) > 0"
    )
    assert metric_names(expression) == {"vllm:x_seconds_bucket", "braid_steps_total"}
    assert label_names(expression) == {"a", "d"}
    assert metric_names("sum(rate(no_such_metric_total[5m]))") - sample_names(real_scrape())


def test_the_dashboard_names_its_datasource_by_a_provisioned_uid() -> None:
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"datasource": \{"type": "prometheus", "uid": "([^"]*)"\}', text)) == uids
    assert '"datasource": "' not in text, "a datasource by display name breaks when it is renamed"
    assert not re.search(r'"datasource": \d', text)
    assert "id" not in DASHBOARD, "an absolute dashboard id clashes with what Grafana has"


def test_the_dashboard_is_provisioned_from_where_compose_mounts_it() -> None:
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/braid.yml").read_text())["providers"][0]
    grafana = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["grafana"]
    path = provider["options"]["path"]
    assert f"./grafana/dashboards:{path}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{path}/overview.json"


def test_panels_have_titles_units_places_and_unique_ids() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    cells: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        area = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in area) < 24, panel["title"]
        assert not cells & area, f"{panel['title']} overlaps another panel"
        cells |= area
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_counters_are_shown_as_rates_and_gauges_are_not() -> None:
    for where, expression in expressions():
        for name in metric_names(expression):
            is_counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
            has_rate = re.search(r"(rate|increase)\(" + re.escape(name), expression)
            assert bool(has_rate) == is_counter or name == "braid_engine_restarts", f"{where}: {name}"


def test_every_alert_says_how_bad_it_is_and_what_happened() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"warning", "critical"}, rule["alert"]
        assert len(rule["annotations"]["summary"]) > 20


def test_prometheus_scrapes_the_service_of_the_compose_file() -> None:
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    host, port = jobs["braid"][0].split(":")
    assert host in services
    assert f"127.0.0.1:{port}:{port}" in services[host]["ports"]
    assert config["rule_files"] == ["alerts.yml"]
    for rule in RULES:
        for job in re.findall(r'job="([^"]*)"', rule["expr"]):
            assert job in jobs, rule["alert"]
