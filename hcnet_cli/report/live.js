// --- a served page: asks whether runs have changed, and loads itself again with the same choices
{
  const KEY = "hcnet-live", boxes = () => $$("#curve-runs label"), input = (box) => $("input", box);
  const change = (field, value) => { field.value = value; field.dispatchEvent(new Event("change")); };
  const keep = () => sessionStorage.setItem(KEY, JSON.stringify({
    group: $("#curve-group")?.value,
    on: boxes().filter((box) => input(box).checked).map((box) => box.title),
    off: boxes().filter((box) => !input(box).checked).map((box) => box.title),
    open: $$("#run-list > details[open] .folder").map((name) => name.textContent),
    columns: $$("section.all-columns").map((section) => section.id),
    y: scrollY,
  }));
  const kept = JSON.parse(sessionStorage.getItem(KEY) ?? "null");
  sessionStorage.removeItem(KEY);
  if (kept) {
    const choice = $("#curve-group");
    if (choice && [...choice.options].some((option) => option.value === kept.group)) change(choice, kept.group);
    for (const box of boxes()) {
      const wanted = kept.on.includes(box.title) || (input(box).checked && !kept.off.includes(box.title));
      if (wanted !== input(box).checked) input(box).click();
    }
    for (const name of $$("#run-list .folder")) if (kept.open.includes(name.textContent)) name.closest("details").open = true;
    for (const id of kept.columns) $(`#${CSS.escape(id)} button.columns`)?.click();
    scrollTo(0, kept.y);
  }
  const state = $("#live");
  const look = async () => {
    try {
      const version = await (await fetch("/version", { cache: "no-store" })).text();
      state.textContent = "live";
      state.classList.remove("gone");
      if (version !== state.dataset.version && !$("#zoom").open && !document.hidden) { keep(); location.reload(); }
    } catch {
      state.textContent = "not watching: hcnet report --watch has ended";
      state.classList.add("gone");
    }
  };
  setInterval(look, 2000);
  document.addEventListener("visibilitychange", look);
}
