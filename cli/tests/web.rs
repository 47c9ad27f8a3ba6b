//! `flowtape web`: the page that trains, in a real browser. It needs what `web/build.sh` makes: `FLOWTAPE_REQUIRE=web` wants it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // the helpers of tests may panic, and say what they skip

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use browser::{Browser, Served};
use common::{RECIPE, failure, flowtape, stdout};

mod browser;
mod common;

/// The folder of the page's WebAssembly, where it was built: with that for several `threads`, if that is asked.
fn module(threads: bool) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../web/pkg");
    let (name, part, build) =
        if threads { ("web-threads", "threads", "web/build.sh threads") } else { ("web", ".", "web/build.sh") };
    if folder.join("flowtape_web_bg.wasm").exists() && folder.join(part).join("flowtape_web_bg.wasm").exists() {
        return Some(folder);
    }
    let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == name));
    assert!(!required, "FLOWTAPE_REQUIRE={name}, and {build} did not run");
    println!("skipped: {build} did not run");
    None
}

/// A small model, so that a step takes a few milliseconds.
const SMALL: &str =
    "#model.num_layers=1&model.num_single_layers=0&step_scheduler.local_batch_size=8&step_scheduler.max_steps=60";

/// The weights after so many of those steps of this binary, by kernels that round as WebAssembly's do.
fn portable(step: u64) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let settings = format!(
        "{}&run_dir={}&step_scheduler.ckpt_every_steps={step}&checkpoint.max_recent_checkpoints=60&sampling.every_steps=60",
        &SMALL[1..],
        run.display()
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
    command.args(["train", RECIPE]).args(settings.split('&').flat_map(|setting| ["--set", setting]));
    stdout(&command.env("FLOWTAPE_ISA", "portable").output().unwrap());
    std::fs::read(run.join(format!("checkpoints/step_{step:06}/diffusion_pytorch_model.safetensors"))).unwrap()
}

/// What the browser complained of, less what Chromium itself remarks on the GPU that it does not have.
fn complaints(browser: &mut Browser) -> Vec<String> {
    let remarks = ["WebGPU", "No available adapters."];
    browser.complaints().into_iter().filter(|told| !remarks.iter().any(|remark| told.contains(remark))).collect()
}

/// Waits until a download is there.
fn wait_for(file: &Path) {
    (0..100).take_while(|_| !file.exists()).for_each(|_| std::thread::sleep(Duration::from_millis(50)));
}

/// The pictures that stand there.
const PIXELS: &str = "document.getElementById('samples').toDataURL()";

#[test]
fn without_its_module_it_says_how_to_build_one() {
    let error = failure(&flowtape(&["web", "--module", "no/such/folder"]));
    assert!(error.contains("flowtape_web_bg.wasm") && error.contains("web/build.sh"), "{error}");
}

#[test]
fn the_page_trains_samples_and_keeps_weights_and_asks_nobody_for_anything() {
    let (Some(module), Some(mut browser)) = (module(false), Browser::start()) else { return };
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
    // This browser has no GPU, which is said.
    browser.until("document.getElementById('device').textContent.startsWith('On the CPU alone: this browser ')");
    assert_eq!(browser.eval("document.getElementById('devices').hidden"), true);
    // It trains, and stops where it is told to.
    browser.eval("document.getElementById('run').click()");
    browser.until("document.querySelectorAll('#story li').length >= 3");
    browser.eval("document.getElementById('run').click()");
    let step = "Number(document.getElementById('numbers').textContent.split(' ')[1])";
    std::thread::sleep(Duration::from_millis(500));
    let paused = browser.eval(step);
    std::thread::sleep(Duration::from_millis(500));
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
    wait_for(&file);
    // They are those of the binary.
    assert!(std::fs::read(&file).unwrap() == portable(paused.as_f64().unwrap() as u64));
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
    assert_eq!(complaints(&mut browser), Vec::<String>::new());
    let sent: Vec<String> = browser.requests().into_iter().filter(|url| !url.starts_with("blob:")).collect();
    assert_eq!(sent.len(), 1, "{sent:?}");
    assert_eq!(browser.eval("window.hurt"), Value::Null);
    for (width, height) in [(1280, 900), (390, 844)] {
        for dark in [false, true] {
            let what = format!("{width}{}", if dark { "-dark" } else { "" });
            browser.window(width, height, dark);
            // The curve follows the window a moment later.
            browser.until(&format!(
                "document.querySelector('#curve canvas').width > 100 && document.documentElement.scrollWidth <= {width}"
            ));
            browser.picture(&format!("web-{what}"), width, dark);
        }
    }
}

#[test]
fn a_served_page_trains_on_threads_to_the_bits_of_one() {
    let (Some(module), Some(mut browser)) = (module(true), Browser::start()) else { return };
    let served = Served::start(&["web", "--module", module.to_str().unwrap()]);
    let folder = tempfile::tempdir().unwrap();
    let mut weights = Vec::new();
    for (threads, told) in
        [(1, "The CPU trains on one thread."), (2, "The CPU trains on 2 threads."), (3, "The CPU trains on 3 threads.")]
    {
        let to = folder.path().join(threads.to_string());
        std::fs::create_dir(&to).unwrap();
        browser.call("Page.setDownloadBehavior", json!({ "behavior": "allow", "downloadPath": to }));
        browser.open(&format!("{}?{threads}{SMALL}&threads={threads}", served.1));
        assert_eq!(browser.eval("window.crossOriginIsolated"), true);
        browser.until("document.getElementById('state').textContent === 'ready'");
        assert_eq!(browser.eval("document.getElementById('threads').textContent"), told);
        browser.eval("document.getElementById('run').click()");
        browser.until("document.getElementById('state').textContent === 'finished'");
        browser.eval("document.getElementById('download').click()");
        let file = to.join("digits-step-60.safetensors");
        wait_for(&file);
        weights.push(std::fs::read(file).unwrap());
        assert_eq!(complaints(&mut browser), Vec::<String>::new());
        for asked in browser.requests() {
            assert!(asked.starts_with(&served.1) || asked.starts_with("blob:"), "{asked}");
        }
    }
    assert!(weights.iter().all(|each| *each == weights[0]));
}

/// Runs before the page's script: keeps what workers tell, and lets a test stop them at a step, and take their GPU away, or what waits
/// for one (`?waitless`).
const LISTEN: &str = r#"
    window.told = [];
    window.stopAt = (step) => { worker.stop = step; };
    window.Worker = class extends Worker {
        constructor(script) {
            super(script);
            window.worker = this;
            this.addEventListener("message", ({ data }) => {
                told.push(data);
                if (data.kind === "step" && data.step === this.stop) document.getElementById("run").click();
            });
        }
        postMessage(data, ...rest) {
            if (data.call === "init") this.device = data.device;
            super.postMessage(data, ...rest);
        }
    };
    const waitless = () => ["Suspending", "promising", "JSTag"].forEach((name) => delete WebAssembly[name]);
    const loses = () => {
        const request = GPUAdapter.prototype.requestDevice;
        GPUAdapter.prototype.requestDevice = async function (...asked) {
            const device = await request.apply(this, asked);
            addEventListener("message", ({ data }) => data.lose && device.destroy());
            return device;
        };
    };
    const before = location.search === "?waitless" ? waitless : window.GPUAdapter ? loses : () => {};
    if (before === waitless) waitless();
    window.Blob = class extends Blob {
        constructor(parts, kind = {}) { super(kind.type === "text/javascript" ? [`(${before})();`, ...parts] : parts, kind); }
    };
"#;

#[test]
fn on_webgpu_the_page_trains_as_on_the_cpu_which_goes_on_when_the_gpu_is_lost() {
    let (Some(module), Some(mut browser)) = (module(false), Browser::start_with_gpu()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    stdout(&flowtape(&["web", "--module", module.to_str().unwrap(), "--out", page.to_str().unwrap()]));
    browser.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": LISTEN }));
    let settings = SMALL.replace("max_steps=60", "max_steps=12") + "&model.num_attention_heads=1";
    let text = |id: &str| format!("document.getElementById('{id}').textContent");
    let state = |name: &str| format!("{} === '{name}'", text("state"));
    let run = "document.getElementById('run').click()";
    let losses = "told.filter(({ kind }) => kind === 'step').map(({ loss }) => loss)";
    let pictures =
        "told.filter(({ kind, step }) => kind === 'samples' && step === 12).map(({ pixels }) => Array.from(pixels))[0]";
    browser.open(&format!("file://{}{settings}", page.display()));
    browser.until(&format!("{}.length > 0", text("device")));
    if browser.eval("document.getElementById('devices').hidden") == true {
        let told = browser.eval(&text("device"));
        let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "webgpu"));
        assert!(!required, "FLOWTAPE_REQUIRE=webgpu, and the page says {told}");
        println!("skipped: no WebGPU, the page says {told}");
        return;
    }
    browser.until(&state("ready"));
    browser.eval(run);
    browser.until(&state("finished"));
    let (on_cpu, drawn) = (numbers(&browser.eval(losses)), numbers(&browser.eval(pictures)));
    assert!(on_cpu.len() == 12 && drawn.len() == 30 * 64);
    // After a few steps the GPU takes over from the CPU. It is lost after step 10, of which the page has a checkpoint: the CPU goes on.
    browser.eval("document.getElementById('restart').click()");
    browser.until(&state("ready"));
    browser.eval(&format!("told.length = 0; stopAt(3); {run}"));
    browser.until(&state("paused"));
    browser.eval("document.querySelector('#devices input[value=gpu]').click()");
    browser.until(&format!("worker.device === 'gpu' && {}", state("paused")));
    browser.eval(&format!("stopAt(10); {run}"));
    browser.until(&format!("told.some(({{ kind, step }}) => kind === 'kept' && step === 10) && {}", state("paused")));
    browser.eval("worker.postMessage({ call: 'view', guidance: 2, seed: 1, lose: true })");
    let by_gpu = numbers(&browser.eval(losses));
    assert!(close(&by_gpu, &on_cpu[..by_gpu.len()], 1e-4), "{by_gpu:?} {on_cpu:?}");
    assert!(by_gpu[..3] == on_cpu[..3], "{by_gpu:?} {on_cpu:?}");
    browser.eval(&format!("told.length = 0; {run}"));
    browser.until(&state("finished"));
    let told = browser.eval(&text("device"));
    assert!(told.as_str().unwrap().starts_with("The GPU gave up ("), "{told}");
    assert!(told.as_str().unwrap().ends_with("The CPU goes on from step 10."), "{told}");
    let after = numbers(&browser.eval(losses));
    assert!(close(&after, &on_cpu[10..], 1e-4), "{after:?} {on_cpu:?}");
    let furthest = numbers(&browser.eval(pictures)).iter().zip(&drawn).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(furthest < 1e-3, "{furthest}");
    // Where WebAssembly can't wait for a GPU, the page says so, and trains to the same bits on the CPU.
    browser.open(&format!("file://{}?waitless{settings}", page.display()));
    browser.until(&format!("{}.includes('JSPI') && {}", text("device"), state("ready")));
    browser.eval(run);
    browser.until(&state("finished"));
    assert_eq!(numbers(&browser.eval(losses)), on_cpu);
    let sent: Vec<String> = browser.requests().into_iter().filter(|url| !url.starts_with("blob:")).collect();
    assert_eq!(sent.len(), 1, "{sent:?}");
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// Whether numbers are the same but for this part of them.
fn close(a: &[f64], b: &[f64], part: f64) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= part * b.abs())
}
