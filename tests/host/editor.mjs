// Opens workflows in ComfyUI's graph editor in headless Chromium and tells what it saw, as JSON.
//   node editor.mjs URL JOBS.json REPORT.json
// A job: {graph: FILE, shot: PNG, crop: [node types], run: true, help: node type, replace: true}; crop takes pictures of
// single nodes (PNG-<type>.png), run presses the editor's own queue button and waits, help opens a node's help page,
// replace has the editor replace the nodes of other packs.
// Or {blueprint: NAME, widgets: {name: value}, picture: {width, height}, shot, run}: adds a subgraph blueprint from the
// search box to an empty graph, with a picture as its input and its output shown.
// Or {nodes: [types], shot, search: [words]}: each of these nodes in an empty graph, its help page 260 pixels wide, how it
// grows with lora_count; and what the node search finds for each of the words, in order.
// env: PLAYWRIGHT_CORE a folder whose node_modules holds playwright-core; CHROMIUM the browser (/usr/bin/chromium).
import { createRequire } from 'node:module'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const { chromium } = createRequire(join(process.env.PLAYWRIGHT_CORE, 'x.js'))('playwright-core')
const [url, jobsPath, reportPath] = process.argv.slice(2)
const jobs = JSON.parse(readFileSync(jobsPath, 'utf8'))
const folder = mkdtempSync(join(tmpdir(), 'editor-'))
const context = await chromium.launchPersistentContext(folder, {
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', headless: true, viewport: { width: 1600, height: 1000 },
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--use-gl=swiftshader', '--enable-unsafe-swiftshader'],
})
const TOAST = '.p-toast-message, li[role=alert][data-state]' // newer editors have the second
const log = []
const reports = []
const look = () => {
  const registered = window.LiteGraph.registered_node_types
  return window.app.graph.nodes.map(n => ({
    id: n.id, type: n.type, known: !!registered[n.type], errors: !!n.has_errors,
    widgets: Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value])),
    badCombos: (n.widgets ?? []).filter(w => w.type === 'combo' && Array.isArray(w.options?.values)
      && !w.options.values.includes(w.value)).map(w => `${w.name}=${w.value}`),
    unlinked: (n.inputs ?? []).filter(i => i.link == null && !i.widget).map(i => i.name),
  }))
}
const addEnds = ({ widgets, picture }) => {
  const graph = window.app.graph, node = graph.nodes[0]
  for (const [name, value] of Object.entries(widgets)) {
    const widget = node.widgets.find(w => w.name === name || w.label === name)
    if (!widget) throw new Error(`${name} is none of ${node.widgets.map(w => w.name)}`)
    widget.value = value
  }
  const add = (type, x) => {
    const made = window.LiteGraph.createNode(type)
    made.pos = [node.pos[0] + x, node.pos[1]]
    graph.add(made)
    return made
  }
  const image = node.inputs.findIndex(i => i.name === 'image')
  if (image >= 0) {
    const made = add('EmptyImage', -450)
    for (const widget of made.widgets) widget.value = picture[widget.name] ?? widget.value
    made.connect(0, node, image)
  }
  node.connect(0, add('PreviewImage', 500), 0)
  return graph.nodes.map(n => n.type)
}
// What does not fit into an element: text that is cut off at its right.
const cutOff = ([selector, width]) => {
  const frame = document.querySelector(selector)
  frame.style.cssText += `; width: ${width}px; max-width: none`
  const edge = frame.getBoundingClientRect().right, found = []
  const walk = document.createTreeWalker(frame, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const range = document.createRange()
    range.selectNodeContents(walk.currentNode)
    if ([...range.getClientRects()].some(r => r.right > edge + 1)) found.push(walk.currentNode.textContent)
  }
  return { text: frame.innerText, width: frame.clientWidth, cut: found }
}
// Words of the lines that our nodes show that are broken in two, and the lines.
const brokenWords = toast => {
  const lines = [], broken = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const node = walk.currentNode, text = node.textContent
    if (!/\b(GiB|MiB)\b/.test(text) || node.parentElement.closest(`${toast}, script, style, textarea`)) continue
    if (!node.parentElement.getClientRects().length) continue
    lines.push(text)
    for (const { index, 0: word } of text.matchAll(/\S+/g)) {
      const range = document.createRange()
      range.setStart(node, index)
      range.setEnd(node, index + word.length)
      if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1) broken.push(word)
    }
  }
  return { lines, broken }
}
const add = type => {
  const made = window.LiteGraph.createNode(type)
  window.app.graph.add(made)
  const count = made.widgets?.find(w => w.name === 'lora_count')
  return count && [1, 4].map(slots => {
    count.value = slots
    count.callback(slots)
    return { slots, shown: made.widgets.filter(w => !w.hidden && /_\d+$/.test(w.name)).map(w => w.name), height: made.size[1] }
  })
}
const search = words => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s
  const service = stores.get('nodeDef').nodeSearchService
  return Object.fromEntries(words.map(word => [word, service.searchNode(word).map(found => found.name)]))
}
const queue = ms => new Promise(done => {
  const end = (how, detail) => done({ how, detail })
  window.app.api.addEventListener('execution_error', e => end('error', e.detail.exception_message), { once: true })
  window.app.api.addEventListener('execution_success', () => end('success'), { once: true })
  window.app.queuePrompt(0, 1).then(() => {
    const errors = window.app.lastNodeErrors
    if (Object.keys(errors ?? {}).length) end('refused', JSON.stringify(errors))
  })
  setTimeout(() => end('timeout'), ms)
})
try {
  const page = context.pages()[0] ?? await context.newPage()
  const origin = new URL(url).origin
  const local = u => u.startsWith(origin) || u.startsWith('data:') || u.startsWith('blob:')
  await page.route('**/*', r => (local(r.request().url()) ? r.continue() : r.abort()))
  page.on('console', m => m.type() === 'error' && log.push(`console: ${m.text()} @${m.location().url ?? ''}`))
  page.on('pageerror', e => log.push(`page: ${e.stack ?? e}`))
  page.on('response', r => r.status() >= 400 && log.push(`http ${r.status()}: ${r.url()}`))
  for (const [key, value] of [['Comfy.TutorialCompleted', true], ['Comfy.Workflow.ShowMissingModelsWarning', false],
    ['Comfy.Minimap.Visible', false], ['Comfy.RightSidePanel.IsOpen', false], ['LiteGraph.Canvas.MinFontSizeForLOD', 0],
    ['Comfy.VueNodes.Enabled', !!process.env.NODES_2], ['Comfy.Locale', process.env.EDITOR_LOCALE ?? 'en']])
    await page.request.post(`${url}/api/settings/${key}`, { data: JSON.stringify(value), headers: { 'content-type': 'application/json' } })
  await page.addInitScript(() => localStorage.setItem('Comfy.Settings.TutorialCompleted', 'true'))
  await page.goto(url, { waitUntil: 'domcontentloaded', timeout: 180000 })
  await page.waitForFunction(() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100, null, { timeout: 180000 })
  await page.waitForTimeout(1500)
  for (const job of jobs) {
    const report = { graph: job.graph ?? job.blueprint }
    const graph = job.graph ? JSON.parse(readFileSync(job.graph, 'utf8')) : { nodes: [], links: [], version: 0.4 }
    await page.evaluate(w => window.app.loadGraphData(w, true, true), graph)
    await page.waitForTimeout(1200)
    if (job.nodes) {
      report.grown = await page.evaluate(add, job.nodes[0])
      report.search = await page.evaluate(search, job.search)
      report.pages = {}
      for (const type of job.nodes) {
        await page.evaluate(t => {
          window.app.graph.clear()
          const node = window.LiteGraph.createNode(t)
          node.pos = [500, 300]
          window.app.graph.add(node)
          window.app.canvas.selectNodes([node])
          window.app.canvas.setDirty(true, true)
        }, type)
        const button = page.locator('[data-testid="info-button"]')
        await button.first().waitFor({ timeout: 5000 }).catch(() => {})
        if (!await button.count()) break
        await button.first().click({ timeout: 5000 })
        await page.waitForSelector('.node-help-content h1', { timeout: 10000 })
        await page.waitForTimeout(700)
        report.pages[type] = await page.evaluate(cutOff, ['.node-help-content', 260])
        if (job.shot) await page.locator('.node-help-content').screenshot({ path: job.shot.replace(/\.png$/, `-${type}.png`) })
      }
      reports.push(report)
      continue
    }
    if (job.blueprint) {
      for (let i = 0; i < 4 && !await page.evaluate(() => document.activeElement.tagName === 'INPUT'); i++) {
        await page.mouse.dblclick(700, 600 + 20 * i) // the first may only close what the last job left open
        await page.waitForTimeout(900)
      }
      await page.keyboard.type(job.blueprint)
      await page.waitForTimeout(1500)
      if (job.shot) await page.screenshot({ path: job.shot.replace(/\.png$/, '-search.png') })
      await page.keyboard.press('Enter')
      await page.waitForTimeout(1200)
      if (!await page.evaluate(() => window.app.graph.nodes.length)) { // newer: the node hangs on the pointer until a click
        await page.mouse.click(700, 400)
        await page.waitForTimeout(1200)
      }
      report.inside = await page.evaluate(() => window.app.graph.nodes.map(n => n.subgraph?.nodes.map(i => i.type) ?? n.type))
      if (report.inside.length) report.added = await page.evaluate(addEnds, { widgets: job.widgets, picture: job.picture })
      await page.waitForTimeout(500)
    }
    if (job.replace) {
      const details = page.getByRole('button', { name: /view details/i })
      if (await details.count()) await details.first().click({ timeout: 5000 }).catch(() => {})
      const button = page.getByRole('button', { name: /replace all/i })
      await button.first().waitFor({ timeout: 10000 }).catch(() => {})
      report.replaceButton = await button.count()
      if (job.shot) await page.screenshot({ path: job.shot.replace(/\.png$/, '-before.png') })
      if (report.replaceButton) await button.first().click({ timeout: 5000 }).catch(e => { report.replaceError = String(e) })
      await page.waitForTimeout(1500)
    }
    report.nodes = await page.evaluate(look)
    report.api = (await page.evaluate(() => window.app.graphToPrompt())).output
    await page.evaluate(() => {
      const nodes = window.app.graph.nodes, canvas = window.app.canvas
      const x0 = Math.min(...nodes.map(n => n.pos[0])) - 30, y0 = Math.min(...nodes.map(n => n.pos[1])) - 80
      const x1 = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 30, y1 = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 60
      canvas.ds.scale = Math.min(1, 1480 / (x1 - x0), 900 / (y1 - y0))
      canvas.ds.offset = [-x0 + 60 / canvas.ds.scale, -y0 + 60 / canvas.ds.scale]
      canvas.setDirty(true, true)
    })
    await page.waitForTimeout(600)
    if (job.shot) await page.screenshot({ path: job.shot })
    for (const type of job.crop ?? []) {
      const box = await page.evaluate(t => {
        const n = window.app.graph.nodes.find(n => n.type === t), canvas = window.app.canvas
        canvas.ds.scale = 1.25
        canvas.ds.offset = [-n.pos[0] + 120, -n.pos[1] + 140]
        canvas.setDirty(true, true)
        return [n.size[0], n.size[1]]
      }, type)
      await page.waitForTimeout(500)
      const at = await page.evaluate(t => {
        const n = window.app.graph.nodes.find(n => n.type === t), canvas = window.app.canvas
        const frame = canvas.canvas.getBoundingClientRect(), s = canvas.ds.scale
        return { x: frame.left + (n.pos[0] + canvas.ds.offset[0]) * s, y: frame.top + (n.pos[1] + canvas.ds.offset[1]) * s, s }
      }, type)
      const clip = { x: at.x - 14, y: at.y - 30 * at.s - 12, width: box[0] * at.s + 28, height: (box[1] + 30) * at.s + 24 }
      await page.screenshot({ path: job.shot.replace(/\.png$/, `-${type}.png`), clip })
    }
    if (job.help) {
      await page.evaluate(t => {
        const canvas = window.app.canvas
        canvas.selectNodes([window.app.graph.nodes.find(n => n.type === t)])
        canvas.setDirty(true, true)
      }, job.help)
      await page.waitForTimeout(800)
      const button = page.locator('[data-testid="info-button"]')
      report.helpButton = await button.count()
      if (report.helpButton) await button.first().click({ timeout: 5000 }).catch(e => { report.helpError = String(e) })
      await page.waitForTimeout(2000)
      report.help = await page.evaluate(() => document.body.innerText)
      report.pictures = await page.evaluate(() => [...document.images].filter(i => i.src.includes('/docs/')).map(i => [i.src, i.naturalWidth]))
      await page.screenshot({ path: job.shot.replace(/\.png$/, '-help.png') })
    }
    if (job.run) {
      report.run = await page.evaluate(queue, 300000)
      await page.waitForTimeout(1500)
      report.boxes = await page.evaluate(() => window.app.graph.nodes.map(n => [n.type, ...n.pos, ...n.size]))
      report.covered = await page.evaluate(toast => [...document.querySelectorAll('button')]
        .filter(b => /view details/i.test(b.innerText)).filter(b => {
          const box = b.getBoundingClientRect()
          const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)
          return top && !b.contains(top) && top.closest(toast)
        }).map(b => b.innerText), TOAST)
      report.toasts = await page.evaluate(toast => [...document.querySelectorAll(toast)].map(t => t.innerText), TOAST)
      report.said = await page.evaluate(brokenWords, TOAST)
      if (job.shot) await page.screenshot({ path: job.shot.replace(/\.png$/, '-run.png') })
    }
    reports.push(report)
  }
} finally {
  writeFileSync(reportPath, JSON.stringify({ reports, log }, null, 1))
  await context.close()
  rmSync(folder, { recursive: true, force: true })
}
