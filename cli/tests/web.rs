//! `flowtape web`: the page that trains, in a real browser. It needs what `web/build.sh` makes: `FLOWTAPE_REQUIRE=web` wants it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // the helpers of tests may panic, and say what they skip

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use browser::Browser;
use common::{failure, flowtape, stdout};

mod browser;
mod common;

/// The folder of the page's WebAssembly, where it was built.
fn module() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../web/pkg");
    if folder.join("flowtape_web_bg.wasm").exists() {
        return Some(folder);
    }
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "web"));
    assert!(!required, "FLOWTAPE_REQUIRE=web, and web/build.sh did not run");
    println!("skipped: web/build.sh did not run");
    None
}

/// A small model, so that a step takes a few milliseconds.
const SMALL: &str =
    "#model.num_layers=1&model.num_single_layers=0&step_scheduler.local_batch_size=8&step_scheduler.max_steps=60";

/// The pictures that stand there.
const PIXELS: &str = "document.getElementById('samples').toDataURL()";

#[test]
fn without_its_module_it_says_how_to_build_one() {
    let error = failure(&flowtape(&["web", "--module", "no/such/folder"]));
    assert!(error.contains("flowtape_web_bg.wasm") && error.contains("web/build.sh"), "{error}");
}

#[test]
fn the_page_trains_samples_and_keeps_weights_and_asks_nobody_for_anything() {
    let (Some(module), Some(mut browser)) = (module(), Browser::start()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    stdout(&flowtape(&["web", "--module", module.to_str().unwrap(), "--out", page.to_str().unwrap()]));
    let downloads = json!({ "behavior": "allow", "downloadPath": folder.path() });
    browser.call("Page.setDownloadBehavior", downloads);
    let url = format!("file://{}{SMALL}", page.display());
    browser.window(1280, 900, false);
    browser.open(&url);
    browser.until("document.getElementById('state').textContent === 'ready'");
    browser.until("document.querySelectorAll('#story li').length === 1");
    // It trains, and stops where it is told to.
    browser.eval("document.getElementById('run').click()");
    browser.until("document.querySelectorAll('#story li').length >= 3");
    browser.eval("document.getElementById('run').click()");
    let step = "Number(document.getElementById('numbers').textContent.split(' ')[1])";
    std::thread::sleep(std::time::Duration::from_millis(500));
    let paused = browser.eval(step);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(paused.as_f64().unwrap() >= 20.0 && browser.eval(step) == paused, "{paused}");
    // Guidance and noise change the pictures, the same ones give the same.
    let slide = |browser: &mut Browser, to: f64| {
        let set = format!(
            "(() => {{ const g = document.getElementById('guidance'); g.value = {to}; g.dispatchEvent(new Event('input')); }})()"
        );
        browser.eval(&set);
        browser.until(&format!("document.getElementById('at').textContent.endsWith('guidance {to:.1}')"));
        browser.eval(PIXELS)
    };
    let (one, six) = (slide(&mut browser, 1.0), slide(&mut browser, 6.0));
    assert!(one != six && slide(&mut browser, 1.0) == one, "{one} {six}");
    // Weights go to a file, and come back from it into a new model.
    browser.eval("document.getElementById('download').click()");
    browser.until("document.getElementById('told').textContent.includes('.safetensors')");
    let name = browser.eval("document.getElementById('told').textContent.split(',')[0]").as_str().unwrap().to_owned();
    let file = folder.path().join(name);
    (0..100).take_while(|_| !file.exists()).for_each(|_| std::thread::sleep(std::time::Duration::from_millis(50)));
    browser.eval("document.getElementById('restart').click()");
    browser.until("document.getElementById('state').textContent === 'ready'");
    let fresh = slide(&mut browser, 1.0);
    let choose = |browser: &mut Browser, file: &Path| {
        let input = browser.call("Runtime.evaluate", json!({ "expression": "document.getElementById('load')" }));
        let id = &input["result"]["objectId"];
        browser.call("DOM.setFileInputFiles", json!({ "files": [file], "objectId": id }));
    };
    choose(&mut browser, &file);
    browser.until("document.getElementById('told').textContent.endsWith('is loaded')");
    slide(&mut browser, 2.0);
    assert!(fresh != one && slide(&mut browser, 1.0) == one);
    choose(&mut browser, &page);
    browser.until("document.getElementById('told').textContent.startsWith('page.html: a web page')");
    // To the end.
    browser.eval("document.getElementById('run').click()");
    browser.until("document.getElementById('state').textContent === 'finished'");
    let at = browser.eval("document.getElementById('at').textContent");
    assert!(at.as_str().unwrap().starts_with("step 60,"), "{at}");
    assert_eq!(browser.complaints(), Vec::<String>::new());
    let sent: Vec<String> = browser.requests().into_iter().filter(|url| !url.starts_with("blob:")).collect();
    assert_eq!(sent.len(), 1, "{sent:?}");
    assert_eq!(browser.eval("window.hurt"), Value::Null);
    for (width, height) in [(1280, 900), (390, 844)] {
        for dark in [false, true] {
            let what = format!("{width}{}", if dark { "-dark" } else { "" });
            browser.window(width, height, dark);
            browser.until("document.querySelector('#curve canvas').width > 100");
            let widest = browser.eval("document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(widest <= u64::from(width), "{what}: {widest}");
            browser.picture(&format!("web-{what}"), width, dark);
        }
    }
}
