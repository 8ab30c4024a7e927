// One slice on a canvas: zoom, pan, a slider through the planes, a crosshair, marks, a scale bar.
//
// A frame comes as one array of bytes: the length of a JSON header in four bytes, the header, the pictures. The next one is
// asked for when the last has come, and only where the view is by then: a slow line skips planes, it is never behind.

const AGAIN_MS = 350
const LOST_MS = 5000
const LARGEST_PIXELS = 1024
const CLICK_PIXELS = 4
const WHEEL_PIXELS = 30
const MOST_POINTS = 10000

export function render({model}) {
  const root = document.createElement("div")
  root.className = "pane"
  root.innerHTML = `<div class="title"></div><canvas tabindex="0" role="application"></canvas>
    <div class="note" role="status"></div><div class="foot"><input type="range" min="0" step="1"><span></span></div>`
  const [title, canvas, note, foot] = root.children
  const [slider, where] = foot.children
  const context = canvas.getContext("2d")
  const axis = model.axis
  const across = {x: ["y", "z"], y: ["x", "z"], z: ["x", "y"]}[axis]
  canvas.setAttribute("aria-label", `slice perpendicular to ${axis}; arrows move, Page Up and Page Down change the slice`)

  let position = model.start
  let view = null // {column, row, scale}: the voxel at the canvas's corner, and CSS pixels a voxel
  let frame = null // {header, images}
  let asked = null
  let pending = false
  let timer = 0
  let opening = 0
  let sent = false // to a plane since the volume came
  let wheel = 0
  let fitted = true // until somebody zooms or moves, all is shown whatever the size
  let dragged = null
  let hover = null
  let painted = null // {header, images}: what is painted on a plane
  let strokes = [] // {stroke, position, points, brush}: those that are not in it yet
  let stroke = null // and the one that is being painted
  let strokeCount = 0
  let brush = model.brush // a key that changes it counts at once, before the server has heard of it
  let paintings = 0

  // --- Asking

  function wish() {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    const first = [Math.max(0, Math.floor(view.column)), Math.max(0, Math.floor(view.row))]
    const last = [
      Math.min(model.columns, Math.ceil(view.column + width / view.scale) + 1),
      Math.min(model.rows, Math.ceil(view.row + height / view.scale) + 1),
    ]
    const region = [first[0], first[1], Math.max(1, last[0] - first[0]), Math.max(1, last[1] - first[1])]
    const whole = region[2] >= model.columns && region[3] >= model.rows
    const shown = Math.max(region[2], region[3]) * view.scale * Math.min(2, window.devicePixelRatio || 1)
    const pixels = Math.max(64, Math.min(LARGEST_PIXELS, 32 * Math.ceil(shown / 32)))
    return {position, region: whole ? null : region, pixels, version: model.version}
  }

  function ask() {
    if (!view || model.columns < 1) return
    if (pending) return
    const now = wish()
    const key = JSON.stringify(now)
    if (key === asked) return
    asked = key
    pending = true
    clearTimeout(timer)
    timer = setTimeout(askAnew, LOST_MS) // an answer may be lost where the page is just being drawn
    model.send_msg({type: "want", ...now})
  }

  function askAnew() {
    asked = null
    pending = false
    ask()
  }

  async function decoded(bytes) {
    const data = bytes instanceof Uint8Array ? bytes : new Uint8Array(bytes)
    const length = new DataView(data.buffer, data.byteOffset, 4).getUint32(0, true)
    const header = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length)))
    let start = 4 + length
    const images = {}
    await Promise.all(header.images.map(({name, type, bytes}) => {
      const piece = data.slice(start, start + bytes)
      start += bytes
      return createImageBitmap(new Blob([piece], {type})).then(image => { images[name] = image })
    }))
    return {header, images}
  }

  async function show(bytes) {
    if (!bytes || bytes.byteLength < 4) return
    const {header, images} = await decoded(bytes)
    pending = false
    clearTimeout(timer)
    note.textContent = header.note
    if (header.images.length) {
      for (const image of Object.values(frame ? frame.images : {})) image.close()
      frame = {header, images}
    }
    root.dataset.shown = header.images.length ? header.position : ""
    if (header.again) {
      timer = setTimeout(askAnew, AGAIN_MS)
    }
    draw()
    if (!header.again) ask()
  }

  async function showPainted(bytes) {
    const asked = ++paintings
    const next = bytes && bytes.byteLength >= 4 ? await decoded(bytes) : null
    if (asked !== paintings) return // a newer one has come meanwhile
    for (const image of Object.values(painted ? painted.images : {})) image.close()
    painted = next
    if (painted) strokes = strokes.filter(each => each.stroke > painted.header.answers)
    root.dataset.painted = painted && painted.images.painted ? painted.header.position : ""
    draw()
  }

  // --- Drawing

  function draw() {
    const ratio = window.devicePixelRatio || 1
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio)
      canvas.height = Math.round(height * ratio)
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0)
    context.fillStyle = "#16181c"
    context.fillRect(0, 0, width, height)
    if (!view) return
    // The centre of voxel i is at i, so that its left edge is at i - 1/2: everything below is in canvas pixels.
    const at = (column, row) => [(column - view.column) * view.scale, (row - view.row) * view.scale]
    if (frame) {
      const [column, row, columns, rows] = frame.header.region
      const [left, top] = at(column, row)
      const [wide, high] = [columns * view.scale, rows * view.scale]
      context.imageSmoothingEnabled = view.scale < 4
      const put = image => image && context.drawImage(image, left, top, wide, high)
      context.filter = model.inverted ? "invert(1)" : "none"
      put(frame.images.main)
      if (frame.images.second) {
        const edge = Math.max(left, 0) + model.wipe * (Math.min(left + wide, width) - Math.max(left, 0))
        context.save()
        context.beginPath()
        context.rect(edge, 0, width, height)
        context.clip()
        put(frame.images.second)
        context.restore()
        context.fillStyle = "#ffffffcc"
        context.fillRect(edge - 0.5, Math.max(0, top), 1, high)
      }
      context.filter = "none"
      if (frame.images.labels) {
        context.save()
        context.globalAlpha = 0.45
        context.imageSmoothingEnabled = false
        put(frame.images.labels)
        context.restore()
      }
    }
    paint(at)
    for (const [id, column, row, radius, colour, opacity, dash] of model.marks) {
      const moved = dragged && dragged.pick === id ? dragged.to : null
      const [x, y] = at((moved ? moved[0] : column) + 0.5, (moved ? moved[1] : row) + 0.5)
      context.beginPath()
      context.globalAlpha = opacity
      context.setLineDash(dash ? [4, 3] : [])
      context.lineWidth = id === model.selected ? 4 : 2
      context.strokeStyle = colour
      context.arc(x, y, Math.max(3, radius * view.scale), 0, 2 * Math.PI)
      context.stroke()
      if (id === model.selected) {
        context.lineWidth = 1.5
        context.strokeStyle = "#ffffff"
        context.stroke()
      }
    }
    context.globalAlpha = 1
    context.setLineDash([])
    const [x, y] = at(model.cross[0] + 0.5, model.cross[1] + 0.5)
    context.strokeStyle = "#ffffff90"
    context.lineWidth = 1
    for (const [a, b, c, d] of [[0, y, x - 8, y], [x + 8, y, width, y], [x, 0, x, y - 8], [x, y + 8, x, height]]) {
      context.beginPath()
      context.moveTo(a, b)
      context.lineTo(c, d)
      context.stroke()
    }
    scaleBar(width, height)
    say()
  }

  function paint(at) {
    const plane = frame ? frame.header.position : position
    context.save()
    context.globalAlpha = 0.5
    context.imageSmoothingEnabled = false
    if (painted && painted.images.painted && painted.header.position === plane) {
      const [column, row, columns, rows] = painted.header.region
      context.drawImage(painted.images.painted, ...at(column, row), columns * view.scale, rows * view.scale)
    }
    context.lineCap = context.lineJoin = "round"
    for (const {position: where, points, brush: used} of stroke ? [...strokes, stroke] : strokes) {
      if (where !== plane) continue
      context.strokeStyle = used.colour
      context.lineWidth = Math.max(1, 2 * used.radius) * view.scale
      context.beginPath()
      for (const [column, row] of [points[0], ...points]) context.lineTo(...at(column + 0.5, row + 0.5))
      context.stroke()
    }
    const {colour, radius} = brush
    if (colour && hover) {
      context.globalAlpha = 1
      context.strokeStyle = colour
      context.lineWidth = 1.5
      context.beginPath()
      context.arc(...at(hover[0] + 0.5, hover[1] + 0.5), Math.max(0.5, radius) * view.scale, 0, 2 * Math.PI)
      context.stroke()
    }
    context.restore()
  }

  function scaleBar(width, height) {
    const most = width / 4 / view.scale * model.voxel_size // Å
    if (!(most > 0)) return
    const power = 10 ** Math.floor(Math.log10(most))
    const length = [5, 2, 1].map(step => step * power).find(step => step <= most)
    const pixels = length / model.voxel_size * view.scale
    const text = length >= 10 ? `${length / 10} nm` : `${length} Å`
    context.font = "12px sans-serif"
    const wide = Math.max(pixels, context.measureText(text).width)
    context.fillStyle = "#000000a0"
    context.fillRect(6, height - 34, wide + 12, 28)
    context.fillStyle = "#ffffff"
    context.fillRect(12, height - 13, pixels, 3)
    context.fillText(text, 12, height - 18)
  }

  function say() {
    const angstrom = voxels => (voxels * model.voxel_size).toFixed(0)
    const point = hover || model.cross
    const [column, row] = point.map(Math.round)
    title.textContent = `${across[0]} ${column}  ${across[1]} ${row}  ${axis} ${position}   ` +
      `(${angstrom(column)}, ${angstrom(row)}, ${angstrom(position)} Å)`
    where.textContent = `${axis} ${position} / ${model.count - 1}`
    slider.max = model.count - 1
    slider.value = position
    slider.setAttribute("aria-label", `slice along ${axis}`)
    root.dataset.position = position
  }

  // --- Moving

  function fit() {
    const [width, height] = [canvas.clientWidth, canvas.clientHeight]
    if (!width || !height || model.columns < 1) return
    const scale = Math.min(width / model.columns, height / model.rows)
    view = {scale, column: (model.columns - width / scale) / 2, row: (model.rows - height / scale) / 2}
    fitted = true
    draw()
    ask()
  }

  function go(to, tell = true) {
    to = Math.max(0, Math.min(model.count - 1, Math.round(to)))
    if (to === position) return
    position = to
    say()
    ask()
  }

  function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const least = 0.5 * Math.min(canvas.clientWidth / model.columns, canvas.clientHeight / model.rows)
    const scale = Math.max(least, Math.min(40, view.scale * factor))
    view = {scale, column: view.column + x / view.scale - x / scale, row: view.row + y / view.scale - y / scale}
    moved()
  }

  function moved() {
    fitted = false
    draw()
    ask()
    if (model.paired) model.send_msg({type: "view", view})
  }

  const voxel = event => {
    const box = canvas.getBoundingClientRect()
    return [view.column + (event.clientX - box.left) / view.scale - 0.5,
      view.row + (event.clientY - box.top) / view.scale - 0.5]
  }

  const pickAt = ([column, row]) => {
    const near = model.marks
      .map(([id, c, r, radius]) => [Math.hypot(c - column, r - row), Math.max(radius, 6 / view.scale), id])
      .filter(([distance, radius]) => distance <= radius)
    near.sort((a, b) => a[0] - b[0])
    return near.length ? near[0][2] : null
  }

  canvas.addEventListener("wheel", event => {
    event.preventDefault()
    if (!view) return
    if (event.ctrlKey || event.shiftKey) {
      const box = canvas.getBoundingClientRect()
      zoom(Math.exp(-(event.deltaY || event.deltaX) / 300), event.clientX - box.left, event.clientY - box.top)
      return
    }
    wheel += event.deltaY
    const steps = Math.trunc(wheel / WHEEL_PIXELS)
    wheel -= steps * WHEEL_PIXELS
    if (steps) go(position - Math.sign(steps) * Math.min(Math.abs(steps), 5))
  }, {passive: false})

  canvas.addEventListener("pointerdown", event => {
    if (!view || event.button !== 0) return
    canvas.focus()
    const start = voxel(event)
    if (brush.colour && !event.shiftKey && frame) {
      stroke = {stroke: ++strokeCount, position: frame.header.position, points: [start], brush}
      canvas.setPointerCapture(event.pointerId)
      draw()
      return
    }
    const pick = model.editable && !event.shiftKey ? pickAt(start) : null
    dragged = {x: event.clientX, y: event.clientY, view: {...view}, pick, to: null, moved: false}
    canvas.setPointerCapture(event.pointerId)
  })
  canvas.addEventListener("pointermove", event => {
    if (!view) return
    hover = voxel(event)
    if (stroke) {
      const [column, row] = stroke.points.at(-1)
      const far = Math.hypot(hover[0] - column, hover[1] - row) >= Math.max(0.25, stroke.brush.radius / 8)
      if (far && stroke.points.length < MOST_POINTS) stroke.points.push(hover)
      draw()
    } else if (dragged) {
      const [x, y] = [event.clientX - dragged.x, event.clientY - dragged.y]
      dragged.moved ||= Math.hypot(x, y) > CLICK_PIXELS
      if (dragged.moved && dragged.pick !== null) dragged.to = hover
      else if (dragged.moved) {
        view = {...view, column: dragged.view.column - x / view.scale, row: dragged.view.row - y / view.scale}
      }
      draw()
    } else if (brush.colour) draw()
    else say()
  })
  canvas.addEventListener("pointerup", event => {
    if (stroke) {
      const {stroke: number, position: where, points, brush: {radius, value}} = stroke
      strokes.push(stroke)
      stroke = null
      model.send_msg({type: "stroke", stroke: number, position: where, points, radius, value})
      return
    }
    if (!dragged) return
    const {pick, to, moved: hasMoved} = dragged
    const place = voxel(event)
    dragged = null
    if (to) model.send_msg({type: "move", pick, place: to})
    else if (!hasMoved) {
      model.send_msg({type: "click", place, pick: pickAt(place), add: event.shiftKey, remove: event.altKey})
    }
    if (hasMoved && pick === null) moved()
    else draw()
  })
  canvas.addEventListener("pointerleave", () => { hover = null; if (view) draw() })
  canvas.addEventListener("dblclick", fit)

  canvas.addEventListener("keydown", event => {
    if (!view || event.metaKey || event.ctrlKey) return
    const step = event.shiftKey ? 10 : 1
    const keys = {
      PageUp: () => go(position + step), PageDown: () => go(position - step),
      "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
    }
    const arrows = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}
    if (event.key in keys) keys[event.key]()
    else if (event.key in arrows) {
      model.send_msg({type: "step", by: arrows[event.key].map(by => by * step), pick: event.altKey})
    } else if (event.key.length === 1 || event.key === "Delete") {
      const tool = brush.keys && brush.keys[event.key]
      if (tool) brush = {...brush, ...tool}
      model.send_msg({type: "key", key: event.key})
      draw()
    }
    else return
    event.preventDefault()
  })
  slider.addEventListener("input", () => go(Number(slider.value)))

  // --- Following the server

  model.on("frame", () => show(model.frame))
  model.on("painted", () => showPainted(model.painted))
  model.on(["marks", "cross", "selected", "wipe", "inverted"], draw)
  model.on("brush", () => { brush = model.brush; draw() })
  model.on("version", ask)
  // Of another volume: once all of these have come, so that no plane is asked for that nobody wants to see.
  model.on(["columns", "rows", "count"], () => {
    frame = view = asked = null
    sent = false
    clearTimeout(opening)
    opening = setTimeout(() => {
      if (!sent) position = model.start
      fit()
    }, 0)
  })
  model.on("msg:custom", message => {
    if (message.type === "go") {
      position = message.position
      sent = true
      say()
    } else {
      view = message.view
      fitted = false
      draw()
    }
    ask()
  })
  const observer = new ResizeObserver(() => {
    if (!view || fitted) fit()
    else { draw(); ask() }
  })
  observer.observe(canvas)
  model.on("remove", () => { observer.disconnect(); clearTimeout(timer); clearTimeout(opening) })
  if (model.frame) show(model.frame)
  if (model.painted) showPainted(model.painted)
  return root
}
