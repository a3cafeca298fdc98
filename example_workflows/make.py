"""Writes the example workflows with their API forms and pictures, the subgraph blueprints, and the help pages in other
languages than English.

    python example_workflows/make.py COMFYUI [NAME ...]   # a checkout of ComfyUI, whose Python this is; all or some

With PLAYWRIGHT_CORE, as for tests/host/test_editor.py, it takes the help pages' pictures of nodes and README's, too.

To be run again after a change of nodes' inputs or of the demo model. `templates.py` says what they are; the rest comes
from a running ComfyUI's definitions, and it makes the pictures.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "host"))

from comfyui_server import Server  # noqa: E402
from templates import BLUEPRINTS, PARTS, QWEN, TEMPLATES, TURBO, VAE, Blueprint, Graph, N  # noqa: E402
from workflows import api_path, inputs_of, is_widget, options_of, widgets_of  # noqa: E402

GAP, ROW, WIDGET, TITLE = 80, 20, 24, 30  # pixels: between columns, of a slot, of a widget, of a title
WIDTHS = {"ZImagePromptEncode": 400, "CLIPTextEncode": 400, "SaveImage": 420, "ZImageSampler": 360}
# For the lines, and the live preview, that a node shows once it has run:
ROOM = {
    "ZImageINT4ModelLoader": 180,
    "ZImageTextEncoderLoader": 120,
    "ZImageVAELoader": 120,
    "ZImageLoraLoader": 130,
    "ZImageControlNetLoader": 110,
    "ZImageControlNetApply": 60,
    "ZImageSampler": 330,
    "ZImageSize": 60,
    "ZImageCompare": 130,
    "KSampler": 280,
    "SaveImage": 380,
    "PreviewImage": 320,
}


def size_of(node: N, info: dict) -> list[int]:
    slots = [name for name, definition in inputs_of(info).items() if not is_widget(definition)]
    linked = [name for name, value in node.inputs.items() if isinstance(value, tuple) and name not in slots]
    tall = sum(100 for definition in inputs_of(info).values() if options_of(definition).get("multiline"))
    rows = ROW * max(len(slots) + len(linked), len(info["output"])) + WIDGET * len(widgets_of(info))
    return [WIDTHS.get(node.type, 340), 20 + rows + tall + ROOM.get(node.type, 0)]


def lay_out(nodes: list[N], infos: dict) -> dict[int, tuple[list[int], list[int]]]:
    """{node: (position, size)}: columns side by side, each as wide as its widest node."""
    sizes = {node.id: size_of(node, infos[node.type]) for node in nodes}
    lefts, left = {}, 0
    for column in range(1 + max(node.at[0] for node in nodes)):
        lefts[column] = left
        left += GAP + max((sizes[node.id][0] for node in nodes if node.at[0] == column), default=-GAP)
    return {node.id: ([lefts[node.at[0]], node.at[1]], sizes[node.id]) for node in nodes}


def value_of(node: N, name: str, definition):
    """A widget's value: the one given, else its default."""
    given, options = node.inputs.get(name), options_of(definition)
    if given is not None and not isinstance(given, tuple):
        return given
    if isinstance(definition[0], list):
        return options.get("default", next(iter(definition[0]), ""))
    if definition[0] == "COMBO":
        return options.get("default", next(iter(options.get("options", ())), ""))
    empty = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
    return options.get("default", empty[definition[0]])


def build(groups: dict[str, list[N]], infos: dict, outside: list[tuple[str, int, str]] = ()) -> tuple[list, list, list]:
    """Nodes, links and groups of a graph as the editor saves them; inputs from `outside` get links from node -10.

    A link: [number, source, its output, target, its input, type].
    """
    nodes = [node for members in groups.values() for node in members]
    places, made, links = lay_out(nodes, infos), {}, []
    exposed = {(node, name): slot for slot, (_, node, name) in enumerate(outside)}
    for order, node in enumerate(nodes):
        info, (position, size) = infos[node.type], places[node.id]
        properties = {"Node name for S&R": node.type}
        values = [
            {"control_after_generate": "fixed", "upload": "image"}.get(name)
            or value_of(node, name, inputs_of(info)[name])
            for name in widgets_of(info)
        ]
        models = [value for value in values if value in PARTS]
        if models:
            folders = [
                {"name": name, "url": PARTS[name].folder_url + name, "directory": PARTS[name].folder} for name in models
            ]
            properties["models"] = folders
        names = info.get("output_name") or info["output"]
        entry = {
            "id": node.id,
            "type": node.type,
            "pos": position,
            "size": size,
            "flags": {},
            "order": order,
            "mode": 0,
        }
        entry |= {"inputs": [], "outputs": [], "properties": properties, "widgets_values": values}
        if not info["output_node"]:  # those of nodes that save are new in 0.33
            entry["outputs"] = [{"name": name, "type": kind, "links": []} for name, kind in zip(names, info["output"])]
        if node.title:
            entry["title"] = node.title
        for name, definition in inputs_of(info).items():
            widget, optional = is_widget(definition), name in info["input"].get("optional", {})
            source = node.inputs.get(name) if isinstance(node.inputs.get(name), tuple) else None
            if (node.id, name) in exposed:
                source = (-10, exposed[node.id, name])
            if widget and source is None:
                continue
            kind = "COMBO" if isinstance(definition[0], list) else definition[0]
            slot = {"name": name, "type": kind, "link": None}
            slot |= {"widget": {"name": name}} if widget else {"shape": 7} if optional else {}
            if source:
                slot["link"] = len(links) + 1
                links.append([slot["link"], *source, node.id, len(entry["inputs"]), kind])
            entry["inputs"].append(slot)
        made[node.id] = entry
    for number, source, output, *_ in links:
        if source > 0:
            made[source]["outputs"][output]["links"].append(number)
    frames = []
    for number, (title, members) in enumerate(groups.items(), 1):
        boxes = [(*places[node.id][0], *places[node.id][1]) for node in members]
        x, y = min(box[0] for box in boxes) - 20, min(box[1] for box in boxes) - TITLE - 50
        right, bottom = max(box[0] + box[2] for box in boxes) + 20, max(box[1] + box[3] for box in boxes) + 20
        frame = {"id": number, "title": title, "bounding": [x, y, right - x, bottom - y], "color": "#3f789e"}
        frames.append({**frame, "font_size": 24, "flags": {}})
    return list(made.values()), links, frames


def graph_of(name: str, graph: Graph, infos: dict) -> dict:
    nodes, links, frames = build(graph.groups, infos)
    note = {"id": 99, "type": "MarkdownNote", "pos": [-480, -80], "size": [400, 440], "flags": {}, "order": len(nodes)}
    note |= {"mode": 0, "inputs": [], "outputs": [], "title": graph.title, "properties": {}, "color": "#223"}
    note |= {"bgcolor": "#112", "widgets_values": [graph.note]}
    extra = {"ds": {"scale": 0.6, "offset": [540, 180]}}
    made = {"id": api_path(Path(name)).stem, "revision": 0, "last_node_id": 99, "last_link_id": len(links)}
    made |= {"nodes": [note, *nodes], "links": links, "groups": frames, "config": {}, "extra": extra, "version": 0.4}
    return made


def api_of(nodes: list[N], infos: dict) -> dict:
    """The API form."""
    api = {}
    for node in nodes:
        known, inputs = inputs_of(infos[node.type]), {}
        for name in known:
            given = node.inputs.get(name)
            if isinstance(given, tuple):
                inputs[name] = [str(given[0]), given[1]]
            elif is_widget(known[name]):
                inputs[name] = value_of(node, name, known[name])
        title = node.title or infos[node.type]["display_name"]
        api[str(node.id)] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}
    return api


def blueprint_of(blueprint: Blueprint, infos: dict) -> dict:
    """A graph of one subgraph node, with the subgraph's definition."""
    nodes, links, frames = build(blueprint.groups, infos, blueprint.inputs)
    by_id = {node["id"]: node for node in nodes}
    out = by_id[blueprint.output]["outputs"][0]
    links.append([len(links) + 1, blueprint.output, 0, -20, 0, out["type"]])
    out["links"].append(len(links))
    known = uuid.uuid5(uuid.NAMESPACE_URL, f"zimage-int4/{blueprint.name}")
    left, right = -260, max(node["pos"][0] + node["size"][0] for node in nodes) + 100
    inputs, slots = [], []
    for i, (label, node, name) in enumerate(blueprint.inputs):
        link = next(link for link in links if link[1] == -10 and link[2] == i)
        slot = {"name": label, "type": link[5], "link": None}
        if any("widget" in found and found["name"] == name for found in by_id[node]["inputs"]):
            slot["widget"] = {"name": label}
        slots.append(slot)
        inputs.append({"id": str(uuid.uuid5(known, label)), "name": label, "type": link[5], "linkIds": [link[0]]})
        inputs[-1]["pos"] = [left + 100, 20 + ROW * i]
    output = {"id": str(uuid.uuid5(known, "output")), "name": out["type"], "type": out["type"], "linkIds": [len(links)]}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    state = {"lastGroupId": len(frames), "lastNodeId": max(by_id), "lastLinkId": len(links), "lastRerouteId": 0}
    subgraph = {"id": str(known), "version": 1, "state": state, "revision": 0, "config": {}, "name": blueprint.name}
    subgraph |= {
        "inputNode": {"id": -10, "bounding": [left, 0, 120, 40 + ROW * len(inputs)]},
        "outputNode": {"id": -20, "bounding": [right, 0, 120, 60]},
        "inputs": inputs,
        "outputs": [{**output, "pos": [right + 20, 20]}],
        "widgets": [],
        "nodes": nodes,
        "groups": frames,
        "links": [dict(zip(keys, link)) for link in links],
        "extra": {},
        "category": "Z-Image INT4",
        "description": blueprint.description,
    }
    proxies = [[str(node), name] for (_, node, name), slot in zip(blueprint.inputs, slots) if "widget" in slot]
    whole = {"id": 1, "type": str(known), "pos": [0, 0], "size": [400, 80 + 30 * len(slots)], "flags": {}, "order": 0}
    whole |= {"mode": 0, "inputs": slots, "outputs": [{"name": out["type"], "type": out["type"], "links": []}]}
    whole |= {"properties": {"proxyWidgets": proxies}, "widgets_values": [], "title": blueprint.name}
    made = {"revision": 0, "last_node_id": 1, "last_link_id": 0, "nodes": [whole], "links": [], "version": 0.4}
    return {**made, "definitions": {"subgraphs": [subgraph]}, "extra": {}}


def picture_of(server: Server, graph: Graph, infos: dict, path: Path) -> None:
    """What a workflow makes, as the template's picture; real files are not at hand, the demo's are there for them."""
    from PIL import Image

    api = api_of(graph.nodes, infos)
    entry = server.run(api)
    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = next(i for i, node in api.items() if node["class_type"] == "SaveImage")
    (item,) = entry["outputs"][saved]["images"][:1]
    data = server.get(f"/view?filename={item['filename']}&subfolder={item['subfolder']}&type=output", raw=True)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 384 / min(picture.size)
    picture.resize([round(scale * edge) for edge in picture.size], Image.Resampling.LANCZOS).save(path, quality=88)


def help_page(node: str, language: str) -> str:
    """A node's help page in another language, of the texts in `locales`: nodeDefs.json, and help.json for the notes."""
    folder = HERE.parent / "locales" / language
    texts = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))[node]
    notes = json.loads((folder / "help.json").read_text(encoding="utf-8"))
    titles, title = notes[""], texts["display_name"]
    lines = [
        f"# {title}",
        "",
        texts["description"],
        "",
        f"![{title}](images/{node}.png)",
        "",
        f"## {titles['inputs']}",
        "",
    ]
    lines += [f"- **{name}** ({text['name']}): {text['tooltip']}" for name, text in texts["inputs"].items()]
    lines += ["", f"## {titles['outputs']}", ""]
    lines += [f"- **{text['name']}**: {text['tooltip']}" for text in texts["outputs"].values()]
    if node in notes:
        lines += ["", f"## {titles['notes']}", "", *(f"- {line}" for line in notes[node])]
    return "\n".join(lines) + "\n"


def help_pages() -> None:
    """Write the help pages in all languages but English, which has its own."""
    for folder in sorted((HERE.parent / "locales").iterdir()):
        for node in json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8")):
            page = HERE.parent / "nodes" / "web" / "docs" / node / f"{folder.name}.md"
            page.parent.mkdir(exist_ok=True)
            page.write_text(help_page(node, folder.name), encoding="utf-8")


def stand_ins() -> dict[str, Path]:
    """The demo's files under the names of Turbo's, so that the editor does not miss those."""
    demo = HERE.parent / "zimage_core" / "demo"
    found = {TURBO: "svdq-*.safetensors", QWEN: "text_encoder/*.safetensors", VAE: "vae.safetensors"}
    return {f"{PARTS[name].folder}/{name}": next(demo.glob(pattern)) for name, pattern in found.items()}


def screenshots(server: Server, infos: dict) -> None:
    """Pictures of every node for the help pages, and of the demo's graph for README.md, from the editor."""
    from PIL import Image

    ours = [name for name, info in infos.items() if info["python_module"].startswith("custom_nodes.")]
    row = Graph("", "", {"Nodes": [N(i, name, (i, 0)) for i, name in enumerate(ours, 1)]})
    shots = server.base / "shots"
    shots.mkdir()
    nodes = graph_of("nodes", row, infos)
    for node in nodes["nodes"]:
        node["size"][1] -= ROOM.get(node["type"], 0)
    write(shots / "nodes.json", {**nodes, "groups": []})
    demo = {"graph": str(HERE / "Z-Image demo.json"), "shot": str(shots / "demo.png"), "run": True}
    text = {"graph": str(HERE / "Z-Image text to image.json"), "shot": str(shots / "text.png")}
    jobs = [demo, text, {"graph": str(shots / "nodes.json"), "shot": str(shots / "nodes.png"), "crop": ours}]
    (shots / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", str(HERE.parent / "tests" / "host" / "editor.mjs"), server.url]
    subprocess.run([*command, str(shots / "jobs.json"), str(shots / "report.json")], check=True, timeout=600)
    docs = HERE.parent / "nodes" / "web" / "docs" / "images"
    for name in ours:
        Image.open(shots / f"nodes-{name}.png").convert("P", palette=1, colors=64).save(
            docs / f"{name}.png", optimize=True
        )
    graph = (70, 90, 1560, 700)  # below the tabs, beside the menu
    Image.open(shots / "demo-run.png").convert("RGB").crop(graph).save(docs / "graph.png", optimize=True)
    Image.open(shots / "text.png").convert("RGB").crop(graph).save(HERE / "Z-Image text to image.jpg", quality=85)


def write(path: Path, made: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(comfyui: str, *only: str) -> None:
    help_pages()
    base = Path(tempfile.mkdtemp())
    server = Server(Path(comfyui).resolve(), base, "--cpu", models=stand_ins())
    try:
        infos = server.get("/object_info")
        for name, graph in TEMPLATES.items():
            if only and name not in only:
                continue
            write(HERE / f"{name}.json", graph_of(name, graph, infos))
            write(api_path(HERE / f"{name}.json"), api_of(graph.nodes, infos))
            if not any(value in PARTS for node in graph.nodes for value in node.inputs.values()):
                picture_of(server, graph, infos, HERE / f"{name}.jpg")
        for blueprint in BLUEPRINTS:
            if not only or blueprint.name in only:
                write(HERE.parent / "subgraphs" / f"{blueprint.name}.json", blueprint_of(blueprint, infos))
        if os.environ.get("PLAYWRIGHT_CORE") and not only:
            screenshots(server, infos)
    finally:
        server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
