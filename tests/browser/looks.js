// What somebody would not accept of a page they look at: controls that lie over each other or beyond their column, texts that are
// cut off, and texts that hardly differ from what is behind them. Goes through all shadow trees. Returns a list of texts.
() => {
  const found = []
  const kinds = /^(INPUT|SELECT|BUTTON|PRE|LABEL|CANVAS|TEXTAREA|TH|svg)$/
  const classes = ["title", "bk-tab", "tabulator-cell", "tabulator-col-title"]
  const parent = node => node.assignedSlot || node.parentElement || (node.getRootNode().host ?? null)
  const holds = (one, other) => {
    for (let at = other; at; at = parent(at)) if (at === one) return true
    return false
  }
  const name = ({node}) => `${node.tagName} "${(node.innerText || node.value || node.ariaLabel || node.className || "").slice(0, 40)}"`

  // --- What is to be seen, and the part of it that is not scrolled away

  const seen = []
  const walk = (node, clip) => {
    for (const child of [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children]) {
      const style = getComputedStyle(child)
      if (style.display === "none" || style.visibility === "hidden" || node.tagName === "svg") continue
      const box = child.getBoundingClientRect()
      const part = {
        left: Math.max(clip.left, box.left), right: Math.min(clip.right, box.right),
        top: Math.max(clip.top, box.top), bottom: Math.min(clip.bottom, box.bottom),
      }
      const there = style.display !== "contents" && box.width > 1 && box.height > 1
      if (there && part.right - part.left > 1 && part.bottom - part.top > 1) seen.push({node: child, style, box, part, clip})
      const clips = there && style.overflow !== "visible"
      walk(child, clips ? part : clip)
    }
  }
  walk(document.body, {left: 0, top: 0, right: innerWidth, bottom: innerHeight})
  const controls = seen.filter(({node}) =>
    (kinds.test(node.tagName) || classes.some(each => node.classList.contains(each))) &&
    !node.classList.contains("bk-spin-btn")) // which lies over its field

  // --- Over each other

  for (const [number, one] of controls.entries()) {
    for (const other of controls.slice(number + 1)) {
      const wide = Math.min(one.part.right, other.part.right) - Math.max(one.part.left, other.part.left)
      const high = Math.min(one.part.bottom, other.part.bottom) - Math.max(one.part.top, other.part.top)
      if (wide > 2 && high > 2 && !holds(one.node, other.node) && !holds(other.node, one.node)) {
        found.push(`${name(one)} lies over ${name(other)} by ${Math.round(wide)} x ${Math.round(high)}`)
      }
    }
  }

  // --- Beyond the page or the column, and cut off

  const side = document.querySelector("#sidebar")
  for (const each of controls) {
    const {node, box, style, clip} = each
    const limit = side && holds(side, node) ? side.getBoundingClientRect().right : innerWidth
    if (box.right > limit + 1) found.push(`${name(each)} ends ${Math.round(box.right - limit)} beyond its column`)
    const texts = /^(BUTTON|PRE|LABEL|DIV)$/.test(node.tagName)
    const drawing = node.tagName === "CANVAS" || node.tagName === "svg"
    if (texts && style.overflow !== "visible" && node.scrollWidth > node.clientWidth + 1) found.push(`${name(each)} is cut off`)
    if (drawing && (box.right > clip.right + 1 || box.bottom > clip.bottom + 1)) found.push(`${name(each)} is cut off`)
  }

  // --- Hard to read: WCAG 2.1, 1.4.3

  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true})
  const rgba = colour => {
    context.clearRect(0, 0, 1, 1)
    context.fillStyle = colour
    context.fillRect(0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data].map(value => value / 255)
  }
  const over = ([r, g, b, a], [r0, g0, b0]) => [a * r + (1 - a) * r0, a * g + (1 - a) * g0, a * b + (1 - a) * b0]
  const behind = node => {
    const layers = []
    for (let at = node; at; at = parent(at)) {
      const colour = rgba(getComputedStyle(at).backgroundColor)
      if (colour[3] > 0) layers.push(colour)
      if (colour[3] === 1) break
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [1, 1, 1])
  }
  const light = colour => colour
    .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0)
  for (const each of seen) {
    const {node, style} = each
    const own = [...node.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.data.trim())
    const written = own || ((node.tagName === "INPUT" || node.tagName === "TEXTAREA") && node.value &&
      !["range", "checkbox"].includes(node.type))
    if (!written && node.tagName !== "SELECT") continue
    if (node.disabled || node.classList.contains("note")) continue // a note lies on a picture, with a rim around its letters
    const ground = behind(node)
    const [one, other] = [light(over(rgba(style.color), ground)), light(ground)].sort((a, b) => b - a)
    const contrast = (one + 0.05) / (other + 0.05)
    if (contrast < 4.5) found.push(`${name(each)} has a contrast of ${contrast.toFixed(1)}`)
  }
  return found
}
