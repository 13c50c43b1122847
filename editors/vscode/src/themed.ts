// A page of the server's in the colours of the editor's theme.

const STYLE = `<style>
:root { --back: var(--vscode-editor-background); --text: var(--vscode-editor-foreground);
  --soft: var(--vscode-descriptionForeground); --line: var(--vscode-contrastBorder, var(--vscode-panel-border));
  --one: var(--vscode-charts-blue); --two: var(--vscode-disabledForeground); }
</style>`;

/** The page with the theme's colours in the place of its own. */
export function toThemed(page: string): string {
  return page.replace("</head>", () => `${STYLE}</head>`);
}
