// Points on a canvas: a lasso by dragging, zoom by the wheel, moved with Alt or by arrows, all by 0 or a double click.

const EDGE = 22
const CLICK_PIXELS = 4
const MOST_CORNERS = 500

export function render({model}) {
  const root = document.createElement("div")
  root.className = "scatter"
  const canvas = document.createElement("canvas")
  canvas.tabIndex = 0
  canvas.setAttribute("role", "application")
  root.append(canvas)
  const context = canvas.getContext("2d")

  let points = new Float32Array()
  let view = null // {x, y, scale, stretch}: what is at the centre, pixels a unit along x and y
  let lasso = null // [[x, y], ...] in pixels
  let moved = null

  const bytes = value => value instanceof Uint8Array ? value : new Uint8Array(value || [])
  const at = (x, y) => [canvas.clientWidth / 2 + (x - view.x) * view.wide, canvas.clientHeight / 2 - (y - view.y) * view.high]
  const back = (x, y) => [view.x + (x - canvas.clientWidth / 2) / view.wide, view.y - (y - canvas.clientHeight / 2) / view.high]

  function fit() {
    const data = bytes(model.points)
    points = new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength))
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    if (!points.length || !width || !height) { view = null; draw(); return }
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity]
    for (let i = 0; i < points.length; i += 2) {
      left = Math.min(left, points[i]); right = Math.max(right, points[i])
      low = Math.min(low, points[i + 1]); high = Math.max(high, points[i + 1])
    }
    view = {
      x: (left + right) / 2, y: (low + high) / 2,
      wide: Math.max(1, width - 2 * EDGE) / Math.max(right - left, 1e-9),
      high: Math.max(1, height - 2 * EDGE) / Math.max(high - low, 1e-9),
    }
    draw()
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    canvas.width = Math.round(width * ratio)
    canvas.height = Math.round(height * ratio)
    context.setTransform(ratio, 0, 0, ratio, 0, 0)
    context.fillStyle = "#16181c"
    context.fillRect(0, 0, width, height)
    if (!view) return
    const [kinds, lit] = [bytes(model.kinds), bytes(model.lit)]
    const some = lit.length > 0
    for (const bright of some ? [0, 1] : [1]) {
      context.globalAlpha = bright ? 0.9 : 0.3
      for (let i = 0; i < points.length / 2; i++) {
        if (some && lit[i] !== bright) continue
        const [x, y] = at(points[2 * i], points[2 * i + 1])
        context.fillStyle = model.palette[kinds[i] || 0] || "#bbbbbb"
        context.fillRect(x - 1.5, y - 1.5, 3, 3)
      }
    }
    context.globalAlpha = 1
    context.font = "bold 12px sans-serif"
    context.textAlign = "center"
    context.textBaseline = "middle"
    for (const [number, x0, y0, colour, chosen] of model.marks) {
      const [x, y] = at(x0, y0)
      const wide = context.measureText(number).width / 2 + 4
      context.fillStyle = chosen ? "#d55e00" : "#000000c0"
      context.fillRect(x - wide, y - 8, 2 * wide, 16)
      context.strokeStyle = chosen ? "#ffffff" : colour
      context.lineWidth = 1
      context.strokeRect(x - wide, y - 8, 2 * wide, 16)
      context.fillStyle = "#ffffff"
      context.fillText(number, x, y)
    }
    context.font = "11px sans-serif"
    context.fillStyle = "#ffffffc0"
    context.fillText(model.across, width / 2, height - 9)
    context.save()
    context.translate(9, height / 2)
    context.rotate(-Math.PI / 2)
    context.fillText(model.upward, 0, 0)
    context.restore()
    if (lasso && lasso.length > 1) {
      context.beginPath()
      lasso.forEach(([x, y]) => context.lineTo(x, y))
      context.closePath()
      context.fillStyle = "#56b4e930"
      context.fill()
      context.strokeStyle = "#ffffff"
      context.stroke()
    }
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const [px, py] = back(x, y)
    view = {...view, wide: view.wide * factor, high: view.high * factor}
    const [nx, ny] = back(x, y)
    view = {...view, x: view.x + px - nx, y: view.y + py - ny}
    draw()
  }

  const place = event => {
    const box = canvas.getBoundingClientRect()
    return [event.clientX - box.left, event.clientY - box.top]
  }

  canvas.addEventListener("wheel", event => {
    event.preventDefault()
    if (view) zoom(Math.exp(-event.deltaY / 300), ...place(event))
  }, {passive: false})
  canvas.addEventListener("pointerdown", event => {
    if (!view || event.button !== 0) return
    canvas.focus()
    canvas.setPointerCapture(event.pointerId)
    if (event.altKey) moved = {from: place(event), view}
    else lasso = [place(event)]
  })
  canvas.addEventListener("pointermove", event => {
    const [x, y] = place(event)
    if (moved) {
      const {from, view: before} = moved
      view = {...before, x: before.x - (x - from[0]) / before.wide, y: before.y + (y - from[1]) / before.high}
    } else if (lasso) lasso.push([x, y])
    else return
    draw()
  })
  canvas.addEventListener("pointerup", event => {
    moved = null
    if (!lasso) return
    const [first, path] = [lasso[0], lasso]
    lasso = null
    draw()
    if (path.every(([x, y]) => Math.hypot(x - first[0], y - first[1]) <= CLICK_PIXELS)) {
      const near = model.marks
        .map(([number, x, y]) => [Math.hypot(...at(x, y).map((c, i) => c - first[i])), number])
        .filter(([distance]) => distance < 12)
        .sort((a, b) => a[0] - b[0])
      if (near.length) model.send_msg({type: "mark", number: near[0][1], more: event.shiftKey})
      return
    }
    const every = Math.ceil(path.length / MOST_CORNERS)
    const corners = path.filter((_, number) => number % every === 0).map(([x, y]) => back(x, y))
    model.send_msg({type: "lasso", corners, more: event.shiftKey})
  })
  canvas.addEventListener("dblclick", fit)
  canvas.addEventListener("keydown", event => {
    if (!view || event.metaKey || event.ctrlKey) return
    const by = (x, y) => { view = {...view, x: view.x + x / view.wide, y: view.y + y / view.high}; draw() }
    const keys = {
      "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
      ArrowLeft: () => by(-30, 0), ArrowRight: () => by(30, 0), ArrowUp: () => by(0, 30), ArrowDown: () => by(0, -30),
    }
    if (!(event.key in keys)) return
    keys[event.key]()
    event.preventDefault()
  })

  const label = () => canvas.setAttribute("aria-label", `particles by ${model.across} and ${model.upward}; drag a lasso`)
  model.on("points", fit)
  model.on(["kinds", "lit", "palette", "marks"], draw)
  model.on(["across", "upward"], () => { label(); draw() })
  const observer = new ResizeObserver(() => { if (view) draw(); else fit() })
  observer.observe(canvas)
  model.on("remove", () => observer.disconnect())
  label()
  return root
}
