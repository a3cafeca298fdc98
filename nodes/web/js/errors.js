// Shows the pack's own error messages in full, in a toast: ComfyUI's says only that something failed.
import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"

const NODES = new Set([
  "ZImageINT4ModelLoader",
  "ZImageTextEncoderLoader",
  "ZImagePromptEncode",
  "ZImageSampler",
  "ZImageLoraLoader",
  "ZImageVAELoader",
  "ZImageVAEDecode",
  "ZImageLoraStack",
  "ZImageQuantize",
  "ZImageCompare",
  "ZImageControlNetLoader",
  "ZImageControlNetApply",
])
const OURS = /zimage_core|nodes[\\/]host[\\/]/ // a stock sampler that ran our model

app.registerExtension({
  name: "ZImageINT4.Errors",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => {
      const last = detail?.traceback?.at(-1) ?? ""
      if (!NODES.has(detail?.node_type) && !OURS.test(last)) return
      const node = app.graph?.getNodeById?.(Number(detail.node_id))
      app.extensionManager?.toast?.add({
        severity: "error",
        summary: node?.title ?? detail.node_type,
        detail: String(detail.exception_message ?? "").trim(),
        life: 20000,
      })
    })
  },
})
