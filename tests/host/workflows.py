"""Checks a workflow's two forms against node definitions (`/object_info`'s shape); used with and without ComfyUI."""

from __future__ import annotations

from pathlib import Path

NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def api_path(graph: Path) -> Path:
    """Where the API form of an example workflow is: of "Z-Image text to image.json" api/zimage_text_to_image.json."""
    return graph.parent / "api" / graph.name.lower().replace("-", "").replace(" ", "_")


def inputs_of(info: dict) -> dict[str, list]:
    """{input: its definition} of a node, required ones first, in order."""
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def options_of(definition) -> dict:
    return definition[1] if len(definition) > 1 and isinstance(definition[1], dict) else {}


def is_widget(definition) -> bool:
    return isinstance(definition[0], (list, tuple)) or definition[0] in WIDGET_TYPES


def widgets_of(info: dict) -> list[str]:
    """Names of a node's widget values in the order of `widgets_values`, with those that the editor adds."""
    names = []
    for name, definition in inputs_of(info).items():
        options = options_of(definition)
        if is_widget(definition) and not options.get("forceInput"):
            names.append(name)
            if options.get("control_after_generate"):
                names.append("control_after_generate")
            if options.get("image_upload"):
                names.append("upload")
    return names


def check_value(where: str, value, definition, files: set[str]) -> list[str]:
    """What is wrong with one widget's value; `files` are names that need not be there."""
    kind, options = definition[0], options_of(definition)
    if isinstance(kind, (list, tuple)) or kind == "COMBO":
        allowed = list(kind) if isinstance(kind, (list, tuple)) else options.get("options", [])
        return [] if value in allowed or value in files else [f"{where}: {value!r} is not one of {allowed}"]
    wrong = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
    if not isinstance(value, wrong) or (kind != "BOOLEAN" and isinstance(value, bool)):
        return [f"{where}: {value!r} is no {kind}"]
    if kind in ("INT", "FLOAT"):
        low, high, step = options.get("min"), options.get("max"), options.get("step")
        if (low is not None and value < low) or (high is not None and value > high):
            return [f"{where}: {value} is not in {low}..{high}"]
        if kind == "INT" and step and low is not None and (value - low) % step:
            return [f"{where}: {value} is not a step of {step} from {low}"]
    return []


def check_api(api: dict, infos: dict, files: set[str] = frozenset()) -> list[str]:
    """What is wrong with a workflow's API form; nodes that `infos` lacks are only checked as sources."""
    wrong = []
    for node_id, node in api.items():
        where = f"node {node_id} {node['class_type']}"
        info = infos.get(node["class_type"])
        if info is None:
            continue
        known = inputs_of(info)
        wrong += [f"{where}: no input {name!r}" for name in node["inputs"] if name not in known]
        wrong += [f"{where}: {n!r} is missing" for n in info["input"].get("required", {}) if n not in node["inputs"]]
        for name, value in node["inputs"].items():
            if name not in known:
                continue
            if not isinstance(value, list):
                wrong += check_value(f"{where}.{name}", value, known[name], files)
                continue
            source = api.get(value[0])
            if source is None:
                wrong.append(f"{where}.{name}: comes from node {value[0]}, which is not there")
            elif source["class_type"] in infos:
                outputs = infos[source["class_type"]]["output"]
                if value[1] >= len(outputs) or outputs[value[1]] != known[name][0]:
                    wrong.append(f"{where}.{name}: wants {known[name][0]}, gets output {value[1]} of {outputs}")
    return wrong


def api_of(graph: dict, infos: dict) -> tuple[dict, list[str]]:
    """The API form that the editor would make of a graph (of nodes that `infos` knows), and what is wrong with it."""
    wrong, api = [], {}
    links = {link[0]: link for link in graph["links"]}
    ids = {node["id"]: node for node in graph["nodes"]}
    for number, source, slot, target, target_slot, kind in graph["links"]:
        out, into = ids[source]["outputs"][slot], ids[target]["inputs"][target_slot]
        if out["type"] != kind or into["type"] != kind:
            wrong.append(f"link {number}: {out['type']} -> {into['type']}, said to be {kind}")
        if number not in (out["links"] or []) or into["link"] != number:
            wrong.append(f"link {number}: not named at both its ends")
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = {i["name"]: [str(links[i["link"]][1]), links[i["link"]][2]] for i in node["inputs"] if i.get("link")}
        if node["type"] in infos:
            names = widgets_of(infos[node["type"]])
            values = node.get("widgets_values") or []
            if len(values) != len(names):
                wrong.append(f"node {node['id']} {node['type']}: {len(values)} widget values for {names}")
            given = dict(zip(names, values))
            inputs = {n: v for n, v in given.items() if n not in ("control_after_generate", "upload")} | inputs
            kinds = inputs_of(infos[node["type"]]).items()
            types = {n: "COMBO" if isinstance(d[0], (list, tuple)) else d[0] for n, d in kinds}
            wrong += [
                f"node {node['id']} {node['type']}: input {i['name']!r} is a {types.get(i['name'])}, not {i['type']}"
                for i in node["inputs"]
                if types.get(i["name"]) != i["type"]
            ]
            outputs = [o["type"] for o in node["outputs"]]
            if outputs != list(infos[node["type"]]["output"])[: len(outputs)]:
                wrong.append(f"node {node['id']} {node['type']}: outputs {outputs}")
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api, wrong


def check_pair(graph: dict, api: dict, infos: dict, files: set[str] = frozenset()) -> list[str]:
    """What is wrong with a graph and its API form, alone and compared."""
    made, wrong = api_of(graph, infos)
    wrong += check_api(api, infos, files)
    if {n: node["class_type"] for n, node in made.items()} != {n: node["class_type"] for n, node in api.items()}:
        return [*wrong, "graph and API form have different nodes"]
    for node_id, node in made.items():
        if node["class_type"] in infos and node["inputs"] != api[node_id]["inputs"]:
            wrong.append(f"node {node_id}: graph {node['inputs']}, API {api[node_id]['inputs']}")
    return wrong
