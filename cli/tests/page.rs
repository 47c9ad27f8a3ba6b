//! The page of runs, in a real browser: `flowtape report` and `flowtape watch`.
#![allow(clippy::unwrap_used, clippy::panic)] // the helpers of tests may panic

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use browser::{Browser, Served, http};
use common::{failure, flowtape, stdout};

mod browser;
mod common;

/// What a run's files may say that must stay words.
const HOSTILE: &str =
    "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\u{2028}{{script}}";

/// Trains for 24 steps, with grids and validation.
fn train(run: &Path, more: &[&str]) {
    let settings = [
        "step_scheduler.max_steps=24",
        "step_scheduler.ckpt_every_steps=8",
        "sampling.every_steps=6",
        "validation.num_samples=16",
        "validation.every_steps=6",
        "ema.decay=0.5",
    ];
    let settings: Vec<&str> = settings.iter().chain(more).flat_map(|setting| ["--set", *setting]).collect();
    stdout(&common::train(run, &settings));
}

fn append(path: &Path, text: &str) {
    std::fs::File::options().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

fn url(path: &Path) -> String {
    let path = path.to_string_lossy().replace('%', "%25").replace('#', "%23").replace('?', "%3F").replace(' ', "%20");
    format!("file://{path}")
}

#[test]
fn a_report_is_good_on_every_screen_and_asks_nobody_for_anything() {
    let Some(mut browser) = Browser::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("a <b>&\"run\"");
    train(&run, &["data.drop_last=true"]);
    // What the log warned of.
    assert!(std::fs::read_to_string(run.join("notices.jsonl")).unwrap().contains("which fill no batch"));
    append(&run.join("notices.jsonl"), &format!("{}\n", json!({ "step": 7, "text": HOSTILE })));
    // `train` has written it with its last picture; the warning came later.
    assert!(run.join("report.html").exists());
    let out = stdout(&flowtape(&["report", run.to_str().unwrap()]));
    let page = run.join("report.html");
    assert_eq!(out.trim_end(), page.to_str().unwrap());
    for (width, height) in [(1280, 900), (390, 844)] {
        for dark in [false, true] {
            let what = format!("{width}{}", if dark { "-dark" } else { "" });
            browser.window(width, height, dark);
            browser.open(&url(&page));
            assert_eq!(
                browser.requests(),
                [url(&page).replace('<', "%3C").replace('>', "%3E").replace('"', "%22")],
                "{what}"
            );
            let title = browser.eval("document.querySelector('h1').textContent");
            assert_eq!((title, browser.eval("window.hurt")), (json!("a <b>&\"run\""), Value::Null), "{what}");
            assert!(browser.eval("document.querySelector('.notices').textContent").as_str().unwrap().contains(HOSTILE));
            assert_eq!(browser.eval("document.querySelector('.pill').textContent"), "finished");
            // Nothing is wider than the window, and everything is readable on its ground.
            let widest = browser.eval("document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(widest <= u64::from(width), "{what}: {widest}");
            let contrasts = browser.eval(CONTRASTS);
            let least = contrasts.as_array().unwrap().iter().map(|c| c[0].as_f64().unwrap()).fold(99.0, f64::min);
            assert!(least >= 4.5, "{what}: {contrasts}");
            let ground = browser.eval("getComputedStyle(document.body).backgroundColor").as_str().unwrap().to_owned();
            let light: f64 = ground.trim_start_matches("rgb(").split([',', ')']).next().unwrap().parse().unwrap();
            assert_eq!(light < 100.0, dark, "{ground}");
            for section in ["curves", "samples", "recipe", "figures", "data", "environment", "warnings"] {
                let there = format!("document.getElementById('{section}').getBoundingClientRect().height > 40");
                assert_eq!(browser.eval(&there), true, "{what}: {section}");
            }
            let charts = "[...document.querySelectorAll('.chart')].filter((c) => !c.hidden).map((c) => c.querySelector('h3').textContent)";
            let shown = browser.eval(charts);
            for chart in [
                "Loss",
                "Loss by noise level",
                "Validation loss",
                "Gradient norm by part",
                "Learning rate",
                "Throughput",
                "Memory",
            ] {
                assert!(shown.as_array().unwrap().iter().any(|title| title == chart), "{chart} in {shown}");
            }
            let drawn = "[...document.querySelectorAll('.chart:not([hidden]) canvas')].every((c) => c.width > 100 && \
                         [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].some((v) => v > 0))";
            assert_eq!(browser.eval(drawn), true, "{what}");
            assert_eq!(browser.eval("document.querySelector('.pane img').naturalWidth > 50"), true);
            assert_eq!(browser.complaints(), Vec::<String>::new(), "{what}");
            browser.picture(&format!("report-{what}"), width, dark);
        }
    }
}

/// The contrast of each text with its ground (WCAG), the least ones first.
const CONTRASTS: &str = "(() => {
  const parse = (c) => { const p = (c.match(/[\\d.]+/g) || []).map(Number); return c.startsWith('color(srgb') ? [p[0] * 255, p[1] * 255, p[2] * 255, p[3] ?? 1] : [p[0], p[1], p[2], p[3] ?? 1]; };
  const lum = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0.8) return c; } return [255, 255, 255]; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || e.closest('.skip') || e.disabled || e.closest('script, noscript, option')) continue;
    const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(ground(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.className + ' ' + e.textContent.slice(0, 30)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 5);
})()";

#[test]
fn everything_can_be_reached_by_keyboard_and_several_runs_lie_over_each_other() {
    let Some(mut browser) = Browser::start() else { return };
    let folder = tempfile::tempdir().unwrap();
    let [slow, fast] = ["slow", "fast"].map(|name| folder.path().join(name));
    train(&slow, &[]);
    train(&fast, &["optimizer.lr=0.003", "step_scheduler.max_steps=18"]);
    let both = folder.path().join("both.html");
    stdout(&flowtape(&["report", slow.to_str().unwrap(), fast.to_str().unwrap(), "--out", both.to_str().unwrap()]));
    browser.window(1280, 900, false);
    browser.open(&url(&both));
    let names = browser.eval("[...document.querySelectorAll('.chart em')].slice(0, 2).map((e) => e.textContent)");
    assert_eq!(names, json!(["slow", "fast"]));
    // What differs between them stands first in the recipe.
    let first = browser.eval("[...document.querySelectorAll('#recipe tbody tr')].slice(0, 9).map((row) => [...row.children].map((c) => c.textContent))");
    let rows = first.as_array().unwrap();
    assert!(rows.iter().any(|row| row[0] == "optimizer.lr" && row[1] == "0.001" && row[2] == "0.003"), "{first}");
    // Tab reaches the theme, the tools, each chart, the samples and the tables, and each is seen to have the focus.
    let mut reached: Vec<String> = Vec::new();
    for _ in 0..60 {
        browser.press("Tab");
        let at = browser.eval(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e); \
             return [e.getAttribute('aria-label') || (e === document.body ? 'BODY' : e.textContent.trim()), s.outlineStyle !== 'none' || e.matches('.skip')]; })()",
        );
        let name = at[0].as_str().unwrap().to_owned();
        assert!(at[1] == true || name == "BODY" || name.is_empty(), "{name} does not show that it has the focus");
        reached.push(name);
    }
    for wanted in [
        "Light or dark",
        "Log scale",
        "Zoom in",
        "Loss. Arrow",
        "Memory. Arrow",
        "Step of the samples",
        "Side by side",
        "Keys of the recipe",
    ] {
        assert!(reached.iter().any(|name| name.starts_with(wanted)), "{wanted} in {reached:?}");
    }
    let at = "document.querySelector('.chart .at').textContent";
    browser.eval("document.querySelector('.chart .plot').focus()");
    browser.press("ArrowLeft");
    assert_eq!(browser.eval(at), "step 24");
    browser.press("ArrowLeft");
    assert_eq!(browser.eval(at), "step 23");
    let all = "document.querySelector('[aria-label=\"Show all steps\"]').disabled";
    let spans = "[...document.querySelectorAll('.chart:not([hidden])')].length";
    assert!(browser.eval(spans).as_u64().unwrap() > 6);
    browser.press("+");
    assert_eq!(browser.eval(all), false);
    browser.press("0");
    assert_eq!(browser.eval(all), true);
    // A zoom by pointer: dragged from a third to two thirds.
    let over = browser.eval("(() => { const r = document.querySelector('.u-over').getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()");
    let number = |i: usize| over[i].as_f64().unwrap();
    for (kind, share) in [
        ("mouseMoved", 0.33),
        ("mousePressed", 0.33),
        ("mouseMoved", 0.5),
        ("mouseMoved", 0.66),
        ("mouseReleased", 0.66),
    ] {
        let (x, y) = (number(0) + share * number(2), number(1) + 0.5 * number(3));
        let button = if kind == "mouseMoved" && share == 0.33 { "none" } else { "left" };
        browser.call(
            "Input.dispatchMouseEvent",
            json!({ "type": kind, "x": x, "y": y, "button": button, "buttons": 1, "clickCount": 1 }),
        );
    }
    assert_eq!(browser.eval(all), false);
    browser.eval("document.querySelector('[aria-label=\"Show all steps\"]').click()");
    assert_eq!(browser.eval(all), true);
    // The samples of both, side by side.
    browser.eval(
        "[...document.querySelectorAll('#samples .button')].find((b) => b.textContent === 'Side by side').click()",
    );
    let alts = browser.eval("[...document.querySelectorAll('.pane img')].map((i) => i.alt)");
    assert_eq!(alts, json!(["Samples of slow after step 24", "Samples of fast after step 18"]));
    browser.eval("document.querySelector('.pane input').focus()");
    browser.press("ArrowLeft");
    assert_eq!(browser.eval("document.querySelector('.pane .step').textContent"), "step 18");
    browser.eval("document.getElementById('theme').click()");
    assert_eq!(browser.eval("document.documentElement.dataset.theme"), "dark");
    assert_eq!(browser.complaints(), Vec::<String>::new());
    browser.picture("both-dark", 1280, true);
}

#[test]
fn a_live_page_brings_news_to_this_machine_alone() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    train(&run, &[]);
    let watch = || Served::start(&["watch", run.to_str().unwrap()]);
    let watching = watch();
    let (port, token) = (watching.port(), watching.token().to_owned());
    assert!(token.len() == 32 && watch().token() != token);
    let ask = |method: &str, path: &str, host: &str| {
        let answer = http(port, &format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"));
        (answer.split(' ').nth(1).unwrap_or_default().to_owned(), answer)
    };
    let own = format!("127.0.0.1:{port}");
    let page = format!("/{token}/");
    assert_eq!(ask("GET", &page, &own).0, "200");
    assert_eq!(ask("GET", &page, &format!("localhost:{port}")).0, "200");
    let wrong = "0".repeat(32);
    for (method, path, host, status) in [
        ("GET", "/".to_owned(), &*own, "404"),
        ("GET", format!("/{wrong}/"), &own, "404"),
        ("GET", format!("/{token}"), &own, "404"),
        ("GET", format!("/{token}x/"), &own, "404"),
        ("GET", format!("{page}samples/0/../../recipe.yaml"), &own, "404"),
        ("GET", format!("{page}samples/0/%2e%2e%2frecipe.yaml"), &own, "404"),
        ("GET", format!("{page}samples/0//etc/passwd"), &own, "404"),
        ("GET", format!("{page}samples/9/step_000006.png"), &own, "404"),
        ("GET", format!("{page}recipe.yaml"), &own, "404"),
        ("POST", page.clone(), &own, "405"),
        ("GET", page.clone(), "evil.example", "403"),
        ("GET", page.clone(), &format!("evil.example:{port}"), "403"),
        ("GET", page.clone(), "127.0.0.1", "403"),
    ] {
        let (got, answer) = ask(method, &path, host);
        assert_eq!(got, status, "{method} {path} at {host}");
        assert!(!answer.contains("handwritten") && !answer.contains(&token), "{answer}");
    }
    let (status, answer) = ask("GET", &format!("{page}samples/0/step_000006.png"), &own);
    assert!(status == "200" && answer.contains("image/png") && answer.contains("nosniff"), "{answer}");
    // What is known already is not sent again.
    let (_, data) = ask("GET", &format!("{page}data.json"), &own);
    let tag = data.lines().find_map(|line| line.strip_prefix("ETag: ")).unwrap().trim().to_owned();
    let again =
        format!("GET {page}data.json HTTP/1.1\r\nHost: {own}\r\nIf-None-Match: {tag}\r\nConnection: close\r\n\r\n");
    assert!(http(port, &again).starts_with("HTTP/1.1 304"));

    let Some(mut browser) = Browser::start() else { return };
    browser.window(1280, 900, false);
    browser.open(&watching.1);
    browser.until("document.querySelector('.hero').textContent.includes('step 24')");
    browser.until("document.querySelector('.pane img').naturalWidth > 50");
    // Another process trains on, a line half written; then the run goes on from an earlier checkpoint.
    let line = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().last().unwrap().to_owned();
    append(&run.join("metrics.jsonl"), &(line.replace("\"step\":24", "\"step\":31") + "\n{\"step\":32,\"tr"));
    std::fs::copy(run.join("samples/step_000024.png"), run.join("samples/step_000030.png")).unwrap();
    browser.until("document.querySelector('.hero').textContent.includes('step 31')");
    browser.until("document.querySelector('.pane .step').textContent === 'step 30'");
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    std::fs::write(run.join("metrics.jsonl"), text.lines().take(9).collect::<Vec<_>>().join("\n") + "\n").unwrap();
    browser.until("document.querySelector('.hero').textContent.includes('step 9')");
    for asked in browser.requests() {
        assert!(asked.starts_with(&watching.1), "{asked}");
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn a_run_without_a_step_a_broken_one_and_a_long_one_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    train(&run, &["step_scheduler.max_steps=2"]);
    let (page, report) = (folder.path().join("page.html"), |run: &Path, page: &Path| {
        stdout(&flowtape(&["report", run.to_str().unwrap(), "--out", page.to_str().unwrap()]));
    });
    let mut browser = Browser::start();
    let mut look = |what: &str| {
        let Some(browser) = &mut browser else { return };
        browser.window(390, 844, true);
        browser.call("Page.navigate", json!({ "url": url(&page) }));
        browser.until("document.readyState === 'complete' && document.querySelector('h1') !== null");
        assert_eq!(browser.complaints(), Vec::<String>::new(), "{what}");
    };
    // 200,000 steps are as large a page as two thousand.
    let line = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().last().unwrap().to_owned();
    let many: String =
        (1..=200_000).map(|step| line.replace("\"step\":2", &format!("\"step\":{step}")) + "\n").collect();
    std::fs::write(run.join("metrics.jsonl"), many).unwrap();
    report(&run, &page);
    let bytes = std::fs::metadata(&page).unwrap().len();
    assert!(bytes < 1_500_000, "{bytes}");
    look("many steps");
    let broken = line.replacen("\"train_loss\":", "\"train_loss\":null,\"was\":", 1);
    std::fs::write(run.join("metrics.jsonl"), format!("\u{0}{{nonsense\n{broken}\n{{\"step\":3,\"tra")).unwrap();
    std::fs::write(run.join("recipe.yaml"), "a: [").unwrap();
    std::fs::write(run.join("samples/step_000001.png"), "no picture").unwrap();
    for file in ["environment.json", "report.json", "validation.jsonl"] {
        std::fs::write(run.join(file), "[1, {").unwrap();
    }
    report(&run, &page);
    look("broken files");
    for file in ["metrics.jsonl", "environment.json", "report.json", "validation.jsonl", "notices.jsonl"] {
        std::fs::remove_file(run.join(file)).unwrap();
    }
    std::fs::remove_dir_all(run.join("samples")).unwrap();
    report(&run, &page);
    look("no files");
    std::fs::remove_file(run.join("recipe.yaml")).unwrap();
    let error = failure(&flowtape(&["report", run.to_str().unwrap()]));
    assert!(error.contains("not a run folder"), "{error}");
}
