// The colours that the reader chose, before anything is painted. page.js changes them.
try {
  const chosen = localStorage.getItem("potstill-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* a browser that keeps nothing shows what the system has */ }
