// A grid of small pictures, a page of them at a time. Pictures are asked for as they come into sight, some at once, and
// the next ones when these have come: a slow line is never behind.

const AGAIN_MS = 1000
const AT_ONCE = 16

export function render({model}) {
  const root = document.createElement("div")
  root.className = "gallery"
  root.innerHTML = `<div class="sheet" tabindex="0" role="listbox" aria-multiselectable="true"></div>
    <div class="note" role="status"></div>
    <div class="foot"><button type="button">◀ page</button><button type="button">page ▶</button><span role="status"></span></div>`
  const [sheet, note, foot] = root.children
  const [back, forth, said] = foot.children
  sheet.setAttribute("aria-label", model.label)
  root.style.setProperty("--side", `${model.side}px`)

  let cells = []
  let focus = 0
  let missing = new Set() // places on the page whose pictures are not there
  let seen = new Set() // and those in sight
  let pending = false
  let timer = 0
  let observer = null

  // --- Pictures

  function ask() {
    if (pending) return
    const {serial, first} = model.sheet
    const places = [...missing].filter(place => seen.has(place)).sort((a, b) => a - b).slice(0, AT_ONCE)
    if (!places.length) return
    pending = true
    model.send_msg({type: "want", serial, places: places.map(place => first + place)})
  }

  function show(bytes) {
    if (!bytes || bytes.byteLength < 4) return
    const data = bytes instanceof Uint8Array ? bytes : new Uint8Array(bytes)
    const length = new DataView(data.buffer, data.byteOffset, 4).getUint32(0, true)
    const header = JSON.parse(new TextDecoder().decode(data.subarray(4, 4 + length)))
    pending = false
    if (header.position === model.sheet.serial) {
      let start = 4 + length
      for (const {name, type, bytes} of header.images) {
        const place = Number(name) - model.sheet.first
        const piece = data.slice(start, start + bytes)
        start += bytes
        missing.delete(place)
        const image = cells[place] && cells[place].querySelector("img")
        if (!image) continue
        image.onload = () => URL.revokeObjectURL(image.src)
        image.src = URL.createObjectURL(new Blob([piece], {type}))
      }
      note.textContent = header.note
      if (header.note) {
        // What failed is tried again after a while, or never.
        clearTimeout(timer)
        if (header.again) timer = setTimeout(ask, AGAIN_MS)
        return
      }
    }
    ask()
  }

  // --- Layout

  function lay_out() {
    if (observer) observer.disconnect()
    clearTimeout(timer)
    seen = new Set()
    focus = model.sheet.focus || 0
    note.textContent = ""
    cells = model.captions.map((_, place) => {
      const cell = document.createElement("div")
      cell.className = "cell"
      cell.id = `cell-${place}`
      cell.setAttribute("role", "option")
      cell.innerHTML = `<div class="picture"><img alt="" draggable="false"></div><div></div><div></div>`
      cell.addEventListener("click", event => {
        sheet.focus({preventScroll: true})
        turn_to(place)
        model.send_msg({type: event.shiftKey ? "range" : "choose", place: model.sheet.first + place})
      })
      cell.addEventListener("dblclick", () => tell_key("Enter"))
      cell.addEventListener("mousedown", event => { if (event.shiftKey) event.preventDefault() }) // selects no text
      return cell
    })
    missing = new Set(cells.keys())
    sheet.replaceChildren(...cells)
    sheet.scrollTop = 0
    observer = new IntersectionObserver(entries => {
      for (const entry of entries) {
        const place = cells.indexOf(entry.target)
        if (entry.isIntersecting) seen.add(place)
        else seen.delete(place)
      }
      ask()
    }, {root: sheet, rootMargin: "100px"})
    for (const cell of cells) observer.observe(cell)
    caption()
    mark()
    turn_to(Math.min(focus, Math.max(0, cells.length - 1)), focus > 0)
  }

  function caption() {
    model.captions.forEach(([title, text, colour], place) => {
      if (!cells[place]) return
      const [, first, second] = cells[place].children
      first.textContent = title
      second.textContent = text
      cells[place].title = text ? `${title}\n${text}` : title
      if (!colour) return
      const square = document.createElement("span")
      square.className = "mark"
      square.style.background = colour
      second.prepend(square)
    })
  }

  function mark() {
    const chosen = new Set(model.chosen)
    cells.forEach((cell, place) => cell.setAttribute("aria-selected", chosen.has(place)))
    const {first = 0, page = 0, pages = 1, count = 0} = model.sheet
    const number = value => value.toLocaleString("en")
    said.textContent = (count ? `${number(first + 1)}–${number(first + cells.length)} of ${number(count)}` : "none") +
      (model.chosen_count ? `, ${number(model.chosen_count)} chosen` : "")
    back.disabled = page === 0
    forth.disabled = page >= pages - 1
    back.hidden = forth.hidden = pages < 2
  }

  function turn_to(place, scroll = true) {
    if (cells[focus]) cells[focus].classList.remove("focus")
    focus = place
    if (!cells[focus]) return
    cells[focus].classList.add("focus")
    sheet.setAttribute("aria-activedescendant", cells[focus].id)
    if (scroll) cells[focus].scrollIntoView({block: "nearest"})
  }

  // --- Hands

  const turn_page = (page, end = false) => {
    if (page >= 0 && page < model.sheet.pages) model.send_msg({type: "page", page, end})
  }

  const tell_key = key => model.send_msg({type: "key", key, place: model.sheet.first + focus})

  function step(by) {
    const to = focus + by
    if (to >= 0 && to < cells.length) turn_to(to)
    else if (Math.abs(by) === 1) turn_page(model.sheet.page + by, by < 0)
  }

  sheet.addEventListener("keydown", event => {
    if (event.metaKey || event.ctrlKey || event.altKey) return
    const columns = cells.filter(cell => cell.offsetTop === cells[0].offsetTop).length
    const at = () => model.sheet.first + focus
    const keys = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => step(-columns), ArrowDown: () => step(columns),
      Home: () => turn_to(0), End: () => turn_to(cells.length - 1),
      PageUp: () => turn_page(model.sheet.page - 1), PageDown: () => turn_page(model.sheet.page + 1),
      " ": () => model.send_msg({type: event.shiftKey ? "range" : "choose", place: at()}),
      a: () => model.send_msg({type: "all"}), Escape: () => model.send_msg({type: "none"}),
    }
    if (!cells.length) return
    if (event.key in keys) keys[event.key]()
    else if (event.key.length === 1 || event.key === "Enter" || event.key === "Delete") tell_key(event.key)
    else return
    event.preventDefault()
  })
  back.addEventListener("click", () => turn_page(model.sheet.page - 1))
  forth.addEventListener("click", () => turn_page(model.sheet.page + 1))

  // --- Following the server

  model.on("sheet", lay_out)
  model.on("captions", caption)
  model.on(["chosen", "chosen_count"], mark)
  model.on("frame", () => show(model.frame))
  model.on("remove", () => { if (observer) observer.disconnect(); clearTimeout(timer) })
  lay_out()
  return root
}
