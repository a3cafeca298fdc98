// Shows the pack's own error messages in full, in a toast: ComfyUI's says only that something failed, or asks for a click.
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
  "ZImageLoraSwitches",
  "ZImageQuantize",
  "ZImageCompare",
  "ZImageControlNetLoader",
  "ZImageControlNetApply",
  "ZImageSize",
  "ZImageNAG",
  "ZImageVariety",
])
const OURS = /zimage_core|nodes[\\/]host[\\/]/ // a stock sampler that ran our model

function show(type, id, sentence) {
  const node = app.graph?.getNodeById?.(Number(id))
  app.extensionManager?.toast?.add({
    severity: "error",
    summary: node?.title ?? type,
    detail: String(sentence ?? "").trim(),
    life: 20000,
    styleClass: "zimage-int4-error",
  })
}

// The sentence of one validation error, without the input's name that ComfyUI puts before ours.
function words({ type, message, details, extra_info }) {
  if (type === "custom_validation_failed") return details.replace(`${extra_info?.input_name} - `, "")
  return `${message}: ${details}`
}

app.registerExtension({
  name: "ZImageINT4.Errors",
  setup() {
    const style = document.createElement("style")
    style.textContent = ".p-toast:has(.zimage-int4-error) { margin-top: 9rem }" // below ComfyUI's own box with its "View details"
    document.head.append(style)
    api.addEventListener("execution_error", ({ detail }) => {
      const last = detail?.traceback?.at(-1) ?? ""
      if (NODES.has(detail?.node_type) || OURS.test(last)) show(detail.node_type, detail.node_id, detail.exception_message)
    })
    const queuePrompt = api.queuePrompt
    api.queuePrompt = async function (...args) {
      try {
        return await queuePrompt.apply(this, args)
      } catch (error) {
        for (const [id, found] of Object.entries(error?.response?.node_errors ?? {}))
          if (NODES.has(found.class_type)) show(found.class_type, id, found.errors.map(words).join("\n"))
        throw error
      }
    }
  },
})
