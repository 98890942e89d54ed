// Opens pages in a real browser: light, dark, on a phone and in print. Prints what is wrong with
// each as one JSON document, and leaves pictures where the second argument says.
//
//     node tools/browser/check_page.cjs CHROMIUM FOLDER PAGE...
//
// Needs playwright-core and axe-core where node finds them.
const path = require("path");
const { chromium } = require("playwright-core");
const axe = require("axe-core");

const VIEWS = {
  light: { viewport: { width: 1200, height: 900 }, colorScheme: "light" },
  dark: { viewport: { width: 1200, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 390, height: 844 }, colorScheme: "light", deviceScaleFactor: 2 },
  print: { viewport: { width: 794, height: 1123 }, colorScheme: "dark", media: "print" },
};

async function checkView(browser, page, name, folder) {
  const { media, ...options } = VIEWS[name];
  const context = await browser.newContext(options);
  const tab = await context.newPage();
  const problems = [];
  tab.on("console", (message) => problems.push(`console: ${message.text()}`));
  tab.on("pageerror", (error) => problems.push(`error: ${error.message}`));
  tab.on("request", (request) => {
    if (/^https?:/.test(request.url())) problems.push(`request: ${request.url()}`);
  });
  if (media) await tab.emulateMedia({ media });
  await tab.goto(`file://${path.resolve(page)}`);
  if (!media) await tab.evaluate(() => document.querySelectorAll("details").forEach((d) => (d.open = true)));
  const wider = await tab.evaluate(
    () => document.documentElement.scrollWidth - document.documentElement.clientWidth,
  );
  if (wider > 0) problems.push(`the page is ${wider} px wider than its window`);
  await tab.evaluate(axe.source);
  const { violations } = await tab.evaluate(() => window.axe.run());
  for (const found of violations) {
    for (const node of found.nodes) problems.push(`axe ${found.id}: ${node.html.slice(0, 160)}`);
  }
  const picture = path.join(folder, `${path.basename(page, ".html")}-${name}`);
  await tab.screenshot({ path: `${picture}.png`, fullPage: true });
  if (media) await tab.pdf({ path: `${picture}.pdf`, format: "A4" });
  await context.close();
  return problems;
}

async function main([executablePath, folder, ...pages]) {
  const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"];
  const browser = await chromium.launch({ executablePath, args });
  const found = {};
  for (const page of pages) {
    for (const name of Object.keys(VIEWS)) {
      found[`${page} ${name}`] = await checkView(browser, page, name, folder);
    }
  }
  await browser.close();
  console.log(JSON.stringify(found, null, 1));
}

main(process.argv.slice(2));
