//! A real browser without a window, driven by Chrome's DevTools protocol over two pipes.
#![allow(dead_code)] // not every file of tests calls all
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // the helpers of tests may panic, and say what they skip

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What Chromium may be called.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// The longest that it may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A browser with one page.
pub struct Browser {
    child: Child,
    to: ChildStdin,
    from: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    /// What it told without being asked since the page was opened.
    events: Vec<Value>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts it. Without Chromium nothing is tested, which is said; `FLOWTAPE_REQUIRE=chromium` makes it a failure.
    pub fn start() -> Option<Self> {
        Self::start_with(&["--disable-gpu"])
    }

    /// The same with WebGPU, in software, which is to compile kernels as they are: with the checks that browsers add it takes four times as
    /// long.
    pub fn start_with_gpu() -> Option<Self> {
        let unchecked = "--enable-dawn-features=disable_robustness,disable_workgroup_init";
        let software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];
        Self::start_with(&[&software[..], &[unchecked]].concat())
    }

    fn start_with(gpu: &[&str]) -> Option<Self> {
        let is_there = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success());
        let Some(name) = NAMES.into_iter().find(is_there) else {
            let required = std::env::var("FLOWTAPE_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "chromium"));
            assert!(!required, "FLOWTAPE_REQUIRE=chromium, and there is none");
            println!("skipped: no chromium");
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        // It reads commands from file 3 and writes answers to file 4; a shell puts our pipes there.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>&1", name]);
        shell.args(["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"]).args(gpu);
        shell.args(["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]);
        shell.arg(format!("--user-data-dir={}", profile.path().display()));
        let mut child = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, from) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(out).split(0).map_while(Result::ok) {
                if send.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self { child, to, from, calls: 0, session: None, events: Vec::new(), _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        ["Page", "Runtime", "Log", "Network"].iter().for_each(|domain| {
            browser.call(&format!("{domain}.enable"), json!({}));
        });
        Some(browser)
    }

    /// One command and its answer.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.to.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let answer = self.from.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{method}: {error}"));
            if answer["id"] == self.calls {
                assert!(answer.get("error").is_none(), "{method}: {answer}");
                return answer["result"].clone();
            }
            self.events.push(answer);
        }
    }

    /// A window of this size, light or dark; narrow ones are phones.
    pub fn window(&mut self, width: u32, height: u32, dark: bool) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }, { "name": "prefers-reduced-motion", "value": "reduce" }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Opens an address and waits until it is drawn.
    pub fn open(&mut self, url: &str) {
        self.events.clear();
        self.call("Page.navigate", json!({ "url": url }));
        self.until("document.readyState === 'complete' && document.querySelector('main section') !== null");
    }

    /// The value of an expression.
    pub fn eval(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", asked);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub fn until(&mut self, expression: &str) {
        let begun = Instant::now();
        while self.eval(expression) != true {
            let text = "document.body ? document.body.innerText.slice(0, 2000) : ''";
            assert!(begun.elapsed() < PATIENCE, "never: {expression}\n{}", self.eval(text));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Presses a key by its name, such as `Tab`, or a character.
    pub fn press(&mut self, key: &str) {
        let text = if key.chars().count() == 1 { key } else { "" };
        let code = match key {
            "Tab" => 9,
            "Enter" => 13,
            "ArrowLeft" => 37,
            "ArrowRight" => 39,
            _ => 0,
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// Errors and warnings that the page caused.
    pub fn complaints(&mut self) -> Vec<String> {
        // What was told before this is told now.
        self.eval("1");
        let of = |event: &Value| match event["method"].as_str() {
            Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled") => Some(event.to_string()),
            Some("Log.entryAdded") if event["params"]["entry"]["level"] != "verbose" => Some(event.to_string()),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }

    /// Addresses that the page asked for, but for those that hold their content themselves.
    pub fn requests(&mut self) -> Vec<String> {
        self.eval("1");
        let sent = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        let urls = sent.filter_map(|event| event["params"]["request"]["url"].as_str());
        urls.filter(|url| !url.starts_with("data:")).map(str::to_owned).collect()
    }

    /// The whole page as a picture, into the folder that `FLOWTAPE_SCREENSHOTS` names, if any.
    pub fn picture(&mut self, name: &str, width: u32, dark: bool) {
        let Some(folder) = std::env::var_os("FLOWTAPE_SCREENSHOTS") else { return };
        let height = self.eval("document.documentElement.scrollHeight").as_u64().unwrap().min(9000) as u32;
        self.window(width, height, dark);
        std::thread::sleep(Duration::from_millis(300));
        let taken = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let bytes = decoded(taken["data"].as_str().unwrap());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{name}.png")), bytes).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Base64.
fn decoded(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::prelude::BASE64_STANDARD.decode(text).unwrap()
}

/// A command that serves a page until it is dropped, and the page's address.
pub struct Served(Child, pub String);

impl Served {
    pub fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowtape"));
        let mut child = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self(child, address.trim_end().to_owned())
    }

    pub fn port(&self) -> u16 {
        self.1.trim_start_matches("http://127.0.0.1:").split('/').next().unwrap().parse().unwrap()
    }

    pub fn token(&self) -> &str {
        self.1.trim_end_matches('/').rsplit('/').next().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The whole answer to a request over a connection of its own.
pub fn http(port: u16, request: &str) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    let mut reader = BufReader::new(stream);
    while let Ok(n @ 1..) = reader.read_until(b'\n', &mut answer) {
        let _ = n;
    }
    String::from_utf8_lossy(&answer).into_owned()
}
