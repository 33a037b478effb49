"""A real scrape of our own metrics, and the names that PromQL expressions use."""

import re

from server.metrics import Metrics

# Words of PromQL, labels and Grafana's own variables that look like names.
NOT_METRICS = {
    *(
        "sum",
        "avg",
        "min",
        "max",
        "rate",
        "increase",
        "histogram_quantile",
        "clamp_min",
        "scalar",
        "changes",
        "by",
        "le",
    ),
    *("and", "or", "unless", "on", "offset", "label_values", "up", "time", "without", "ignoring", "absent"),
}


def real_scrape() -> str:
    """What a server shows that has answered one request. Every other series exists from the start."""
    metrics = Metrics("braid-tiny", 2048)
    metrics.observe_http("/v1/completions", "POST", 200, 0.5)
    return metrics.render().decode()


def sample_names(scrape: str) -> set[str]:
    """Names of the samples in Prometheus' text format."""
    return {re.split(r"[{ ]", line)[0] for line in scrape.splitlines() if line and not line.startswith("#")}


def metric_names(expression: str) -> set[str]:
    """Names of metrics that a PromQL expression reads."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    bare = re.sub(r"\blabel_values\(\s*([\w:]+)\s*,\s*\w+\s*\)", r"\1", bare)
    return {name for name in re.findall(r"(?<![\w.])[a-zA-Z_][\w:]*", bare) if name not in NOT_METRICS}


def label_names(expression: str) -> set[str]:
    """Labels that the expression's selectors name."""
    return {
        label
        for selector in re.findall(r"\{([^}]*)\}", expression)
        for label in re.findall(r'([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*"', selector)
    }
