// Z-Image LoRA Switches: shows as many slots as lora_count says.
import { app } from "../../../scripts/app.js"

const SLOT = /^(?:enabled|lora_name|lora_strength)_(\d+)$/

function show(node) {
  const count = node.widgets.find(w => w.name === "lora_count").value
  for (const widget of node.widgets) {
    const slot = SLOT.exec(widget.name)?.[1]
    if (slot === undefined) continue
    widget.hidden = Number(slot) > count
    widget.options = { ...widget.options, hidden: widget.hidden } // Nodes 2.0
  }
  node.setSize([node.size[0], node.computeSize()[1]])
  app.graph?.setDirtyCanvas?.(true, true)
}

app.registerExtension({
  name: "ZImageINT4.Switches",
  nodeCreated(node) {
    if (node.comfyClass !== "ZImageLoraSwitches") return
    const count = node.widgets.find(w => w.name === "lora_count")
    const before = count.callback
    count.callback = function (...args) {
      const result = before?.apply(this, args)
      show(node)
      return result
    }
    show(node)
  },
  loadedGraphNode(node) {
    if (node.comfyClass === "ZImageLoraSwitches") show(node)
  },
})
